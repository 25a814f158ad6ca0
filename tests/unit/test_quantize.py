"""Quantizing whole files: what is in them, what is refused, and that they are there whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TinyShape, write_tiny_model

from pyinfer.convert import pipeline
from pyinfer.convert.encode import encode
from pyinfer.convert.importance_matrix import ImportanceMatrix
from pyinfer.convert.quantize import plan_quantization
from pyinfer.convert.type_plan import PlanOptions
from pyinfer.errors import ConvertError
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.writer import write_gguf

pytestmark = pytest.mark.unit

Cli = Callable[..., tuple[int, str, str]]
SHAPE = TinyShape(n_embd=256, n_ff=512, n_layers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "f32.gguf", codec="F32", shape=SHAPE)


@pytest.fixture
def imatrix(source: Path, tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with GGUFFile.open(source) as file:
        sums = {
            name: rng.random((1, tensor.shape[-1]), np.float32) * 9
            for name, tensor in file.tensors.items()
            if name.startswith("blk.") and len(tensor.shape) == 2
        }
    matrix = ImportanceMatrix(sums, {name: np.array([3], np.float32) for name in sums}, ("book.txt",), 7, 64)
    matrix.save(tmp_path / "imatrix.gguf")
    return tmp_path / "imatrix.gguf"


def test_file_has_the_planned_types_and_bytes(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with GGUFFile.open(source) as before:
        plan = plan_quantization(before, "q4_k_m")
        told: list[int] = []
        plan.write(path, told.append)
        assert told[-1] == plan.n_bytes and told == sorted(told)
        with GGUFFile.open(path) as after:
            assert list(after.tensors) == list(before.tensors)
            assert {"Q4_K", "Q6_K", "F32"} == {tensor.codec.name for tensor in after.tensors.values()}
            for name, tensor in after.tensors.items():
                assert tensor.shape == before.tensors[name].shape
                assert tensor.codec.name == plan.types[name].codec
                rows = before.tensors[name].dequantize().reshape(-1, tensor.shape[-1])
                np.testing.assert_array_equal(tensor.data, encode(tensor.codec.name, rows), err_msg=name)
            changed = {"general.file_type": 15, "general.quantization_version": 2}
            assert {k: v for k, v in after.metadata.items() if k in changed} == changed
            for key, value in before.metadata.items():
                if key not in changed:
                    np.testing.assert_array_equal(after.metadata[key], value, err_msg=key)
        assert plan.n_bytes == sum(tensor.n_bytes for tensor in GGUFFile.open(path).tensors.values())
        assert plan.bits_per_weight == pytest.approx(8 * plan.n_bytes / plan.n_parameters)


def test_chunks_make_the_same_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GGUFFile.open(source) as file:
        plan_quantization(file, "q5_k_s").write(tmp_path / "whole.gguf")
        monkeypatch.setattr(pipeline, "_WEIGHTS_PER_TASK", 1000)
        plan_quantization(file, "q5_k_s", n_threads=1).write(tmp_path / "chunks.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "chunks.gguf").read_bytes()


def test_quantizing_twice_must_be_asked_for(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "q8.gguf"
    with GGUFFile.open(source) as file:
        plan_quantization(file, "q8_0").write(path)
    with GGUFFile.open(path) as file:
        with pytest.raises(ConvertError, match=r"is Q8_0 already.*--allow-requantize"):
            plan_quantization(file, "q4_0")
        plan_quantization(file, "q8_0")  # nothing changes its type
        plan_quantization(file, "q4_0", allow_requantize=True).write(tmp_path / "q4.gguf")
    with GGUFFile.open(tmp_path / "q4.gguf") as file:
        assert file.tensors["blk.0.ffn_up.weight"].codec.name == "Q4_0"


def test_imatrix_weighs_the_columns_and_is_named(source: Path, imatrix: Path, tmp_path: Path) -> None:
    matrix = ImportanceMatrix.load(imatrix)
    name = "blk.1.ffn_down.weight"
    with GGUFFile.open(source) as file:
        plan_quantization(file, "q3_k_s", imatrix=matrix).write(tmp_path / "out.gguf")
        rows = file.tensors[name].dequantize()
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        columns = matrix.columns(name)
        assert columns is not None and columns.shape == (1, rows.shape[1])
        np.testing.assert_allclose(columns, matrix.sums[name] / 3, rtol=1e-6)
        np.testing.assert_array_equal(file.tensors[name].data, encode("Q3_K", rows, columns[0]))
        found = {key: value for key, value in file.metadata.items() if key.startswith("quantize.")}
    assert found == {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "book.txt",
        "quantize.imatrix.entries_count": len(matrix.sums),
        "quantize.imatrix.chunks_count": 7,
    }


def test_experts_have_importances_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 1, (3 * 8, 256)).astype(np.float32)
    name = "blk.0.ffn_up_exps.weight"
    write_gguf(
        tmp_path / "experts.gguf",
        {"general.architecture": "llama", "llama.block_count": 1},
        {name: ("F32", (3, 8, 256), rows.view(np.uint8))},
    )
    sums, counts = rng.random((3, 256), np.float32), np.array([4, 0, 2], np.float32)
    matrix = ImportanceMatrix({name: sums}, {name: counts}, (), 1, 1)
    with GGUFFile.open(tmp_path / "experts.gguf") as file:
        plan_quantization(file, "q4_k_s", imatrix=matrix).write(tmp_path / "out.gguf")
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        data = file.tensors[name].data.reshape(3, 8, -1)
    np.testing.assert_array_equal(data[0], encode("Q4_K", rows[:8], sums[0] / 4))
    np.testing.assert_array_equal(data[1], encode("Q4_K", rows[8:16], np.ones(256, np.float32)))
    np.testing.assert_array_equal(data[2], encode("Q4_K", rows[16:], sums[2] / 2))


def test_imatrix_of_another_model(source: Path) -> None:
    name = "blk.0.attn_q.weight"
    matrix = ImportanceMatrix({name: np.ones((1, 64), np.float32)}, {name: np.ones(1, np.float32)}, (), 1, 1)
    with GGUFFile.open(source) as file, pytest.raises(ConvertError, match=r"attn_q.*1 x 64.*1 x 256"):
        plan_quantization(file, "q4_k_m", imatrix=matrix)


def test_importances_that_make_no_sense_name_their_tensor(source: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    matrix = ImportanceMatrix({name: -np.ones((1, 256), np.float32)}, {name: np.ones(1, np.float32)}, (), 1, 1)
    with GGUFFile.open(source) as file, pytest.raises(ConvertError, match=r"blk\.0\.attn_q\.weight: .*negative"):
        plan_quantization(file, "q4_k_m", imatrix=matrix).write(tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_two_bits_without_importances_are_refused(source: Path, imatrix: Path) -> None:
    with GGUFFile.open(source) as file:
        with pytest.raises(ConvertError, match="give --imatrix"):
            plan_quantization(file, "q2_k_s")
        plan_quantization(file, "q2_k_s", imatrix=ImportanceMatrix.load(imatrix))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no importances"),
        ({"a.in_sum2": [1.0]}, r"has no a\.counts"),
        ({"a.in_sum2": [-1.0], "a.counts": [1.0]}, "negative"),
        ({"a.in_sum2": [np.nan], "a.counts": [1.0]}, "negative or infinite"),
    ],
)
def test_damaged_imatrix(tmp_path: Path, tensors: dict[str, list[float]], message: str) -> None:
    path = tmp_path / "bad.gguf"
    arrays = {name: np.array([values], np.float32) for name, values in tensors.items()}
    write_gguf(
        path,
        {"general.type": "imatrix", "imatrix.datasets": ["x"]},
        {name: ("F32", array.shape, array.view(np.uint8)) for name, array in arrays.items()},
    )
    with pytest.raises(ConvertError, match=message):
        ImportanceMatrix.load(path)


def test_a_model_is_no_imatrix(source: Path) -> None:
    with pytest.raises(ConvertError, match="no importance matrix"):
        ImportanceMatrix.load(source)


def test_nothing_is_left_of_a_failed_write(source: Path, tmp_path: Path) -> None:
    with GGUFFile.open(source) as file:
        plan = plan_quantization(file, "q4_0")

        def full(done: int) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(ConvertError, match=r"cannot be written: No space left on device; nothing is left"):
            plan.write(tmp_path / "out.gguf", full)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ConvertError, match="is the model itself"):
            plan.write(source)
        with pytest.raises(ConvertError, match="No such file or directory"):
            plan.write(tmp_path / "missing" / "out.gguf")


def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_WEIGHTS_PER_TASK", 256)
    monkeypatch.setattr(pipeline, "_TELL_SECONDS", 0.001)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with GGUFFile.open(source) as file, pytest.raises(KeyboardInterrupt):
        plan_quantization(file, "q4_0", n_threads=3).write(tmp_path / "out.gguf", interrupt)
    assert not list(tmp_path.iterdir())
    assert not [t for t in threading.enumerate() if t.name.startswith("pyinfer-quantize")]


def test_a_weight_that_is_not_finite_names_its_tensor(tmp_path: Path) -> None:
    rows = np.ones((4, 256), np.float32)
    rows[3, 3] = np.nan
    write_gguf(
        tmp_path / "nan.gguf",
        {"general.architecture": "llama", "llama.block_count": 1},
        {"blk.0.attn_q.weight": ("F32", (4, 256), rows.view(np.uint8))},
    )
    with GGUFFile.open(tmp_path / "nan.gguf") as file:
        with pytest.raises(ConvertError, match=r"blk\.0\.attn_q\.weight: cannot quantize to Q4_K: a weight is NaN"):
            plan_quantization(file, "q4_k_s").write(tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


# ---- the command


def test_command_writes_what_the_dry_run_says(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    arguments = (str(source), str(out), "Q4_K_M", "--tensor-type", "attn_k=q8_0", "--output-type", "q5_k")
    code, said, _ = cli("quantize", *arguments, "--dry-run")
    assert code == 0 and "would write" in said and not out.exists()
    code, wrote, _ = cli("quantize", *arguments, "-t", "2")
    assert code == 0
    assert wrote.splitlines()[1:] == said.splitlines()[1:]
    with GGUFFile.open(out) as file:
        assert file.tensors["blk.0.attn_k.weight"].codec.name == "Q8_0"
        assert file.tensors["output.weight"].codec.name == "Q5_K"


def test_a_warm_start_is_light(cli: Cli, source: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(source), str(tmp_path / "out.gguf"), "Q4_K_M"]
    assert cli(*arguments)[0] == 0
    program = (
        f"import sys\nfrom pyinfer.cli.entry import run\nassert run({arguments}) == 0\n"
        "print('loaded:', *(name for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True
    )
    loaded = set(done.stdout.split("loaded:")[1].split())
    assert not loaded & {"numba", "pyinfer.graph.backend", "pyinfer.runtime.pull", "tokenizers", "jinja2", "rich"}


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (("Q9_K",), 2, "'Q9_K' is not a type"),
        (("Q4_0", "--tensor-type", "attn_k"), 2, "is not REGEX=TYPE"),
        (("Q4_0", "--tensor-type", "attn_k=q9"), 1, "'q9' is not a tensor type"),
        (("Q4_0", "--max-kld", "0.1"), 1, "--max-kld needs a text"),
        (("Q4_0", "--imatrix", "missing.gguf"), 1, "missing.gguf"),
    ],
)
def test_command_refuses(
    cli: Cli, source: Path, tmp_path: Path, extra: tuple[str, ...], code: int, message: str
) -> None:
    found, _, errors = cli("quantize", str(source), str(tmp_path / "out.gguf"), *extra)
    assert found == code and message in " ".join(errors.split())
    assert not list(tmp_path.iterdir())


def test_command_tells_of_rows_that_fill_no_block(cli: Cli, tmp_path: Path) -> None:
    narrow = write_tiny_model(tmp_path / "narrow.gguf", codec="F32", shape=TinyShape(n_embd=64, n_ff=96))
    code, _, errors = cli("quantize", str(narrow), str(tmp_path / "out.gguf"), "q4_k_s", "--dry-run")
    assert code == 0
    assert "tensors are Q5_0: their rows do not fill blocks of Q4_K" in errors


def report_of(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as file:
        return {k.removeprefix("pyinfer.report."): v for k, v in file.metadata.items() if k.startswith("pyinfer.")}


def test_report_is_stored_and_limits(cli: Cli, source: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_text("In the beginning was the word, and the word was short. " * 12)
    code, said, errors = cli("quantize", str(source), str(out), "q8_0", "--report", str(text), "--max-kld", "0.5")
    assert code == 0, errors
    report = report_of(out)
    assert report["text"] == "text.txt" and report["tokens"] > 100
    assert 0 < report["kl_divergence"] < 0.01 and report["kl_divergence"] <= report["max_kl_divergence"]
    assert report["top1_agreement"] > 0.9
    assert report["perplexity"] == pytest.approx(report["source_perplexity"], rel=0.01)
    assert f"{report['kl_divergence']:.6f}" in said
    with GGUFFile.open(source) as file:
        plan = plan_quantization(file, "q8_0", PlanOptions())
        plan.write(tmp_path / "plain.gguf")
        assert report["bits_per_weight"] == pytest.approx(plan.bits_per_weight)
    with GGUFFile.open(out) as with_report, GGUFFile.open(tmp_path / "plain.gguf") as plain:
        for name, tensor in plain.tensors.items():
            np.testing.assert_array_equal(with_report.tensors[name].data, tensor.data)

    bad = tmp_path / "bad.gguf"
    before = sorted(tmp_path.iterdir())
    code, _, errors = cli("quantize", str(source), str(bad), "q2_k", "--report", str(text), "--max-kld", "1e-9")
    assert code == 1 and "above --max-kld" in errors
    assert sorted(tmp_path.iterdir()) == before
