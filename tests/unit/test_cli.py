"""The command line: exit codes, the sources of options, and what the commands print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyinfer.cli import app, options
from pyinfer.cli.app import COMMANDS, CommandSpec, env_name, load_command
from pyinfer.cli.options import EngineOptions, parse_gpu_layers
from pyinfer.errors import ConfigError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(own_home: Path) -> Path:
    return own_home


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[EngineOptions]:
    """A command `probe` with all shared options, which notes what it got."""
    got: list[EngineOptions] = []

    @options.with_engine_options
    def probe(model: str = "", *, engine: EngineOptions) -> None:
        """Notes its options."""
        got.append(engine)
        if model == "broken":
            raise ValueError("a bug\nof two lines")
        if model == "interrupted":
            raise KeyboardInterrupt
        if model == "denied":
            raise PermissionError(13, "Permission denied", "/secret")
        if model == "huge":
            raise MemoryError

    monkeypatch.setattr(sys.modules[__name__], "probe", probe, raising=False)
    monkeypatch.setitem(app.COMMANDS, "probe", CommandSpec(__name__, "probe"))
    return got


def started(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyinfer", *args],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


class TestExitCodes:
    def test_version_and_help(self) -> None:
        done = started("--version")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("pyinfer ")
        done = started("--help")
        assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)

    @pytest.mark.parametrize(
        "args", [["nonsense"], ["show"], ["show", "a", "b"], ["bench", "x", "-t", "0"], ["list", "-q"]]
    )
    def test_wrong_usage_is_2(self, args: list[str], cli: Cli) -> None:
        code, out, err = cli(*args)
        assert code == 2 and "Error:" in err and out == "" and "Traceback" not in err

    def test_wrong_command_offers_a_near_one(self, cli: Cli) -> None:
        assert "Did you mean 'show'?" in cli("shwo")[2]

    def test_failure_is_1_and_one_line(self) -> None:
        done = started("show", "no-such-model")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("pyinfer: error: no model 'no-such-model'") and done.stderr.count("\n") == 1

    def test_debug_shows_the_traceback(self) -> None:
        for done in (started("show", "nope", "--debug"), started("show", "nope", PYINFER_DEBUG="1")):
            assert done.returncode == 1 and "Traceback" in done.stderr and "ModelNotFoundError" in done.stderr

    @pytest.mark.parametrize(
        ("what", "code", "message"),
        [
            ("broken", 1, "internal error: ValueError: a bug of two lines; run again with --debug"),
            ("interrupted", 130, ""),
            ("denied", 1, "/secret: Permission denied"),
            ("huge", 1, "out of memory"),
        ],
    )
    def test_what_goes_wrong_inside(self, seen: Any, cli: Cli, what: str, code: int, message: str) -> None:
        got, out, err = cli("probe", "--model", what)
        assert got == code and out == "" and message in err and err.count("\n") <= 1

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_signals_end_a_pull_without_rests(
        self, number: int, code: int, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pip that hangs stands for a slow network; it must not outlive the command."""
        fake = tmp_path / "fake" / "pip"
        fake.mkdir(parents=True)
        (fake / "__init__.py").write_text("")
        (fake / "__main__.py").write_text(
            f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        process = subprocess.Popen(
            [sys.executable, "-m", "pyinfer", "pull", "smollm2"], cwd=ROOT, stderr=subprocess.PIPE
        )
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == code and b"Traceback" not in err
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
        assert [p for p in own_home.rglob("*") if p.is_file()] == []

    def test_closed_pipe_is_quiet(self) -> None:
        done = subprocess.run(
            f"{sys.executable} -m pyinfer --help | true",
            cwd=ROOT,
            shell=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr


class TestOptions:
    def test_defaults_are_those_of_the_dataclass(self, seen: list[EngineOptions], cli: Cli) -> None:
        assert cli("probe")[0] == 0
        assert seen == [EngineOptions()]

    def test_flag_beats_environment_beats_file(
        self, seen: list[EngineOptions], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = tmp_path / "c.toml"
        config.write_text(
            "threads = 3\nctx-size = 300\nblock_size = 48\nseed = 3\n[probe]\nseed = 4\n[bench]\nseed = 9\n"
        )
        monkeypatch.setenv("PYINFER_CTX_SIZE", "200")
        monkeypatch.setenv("PYINFER_THREADS", "2")
        assert cli("probe", "--config", str(config), "-t", "1")[0] == 0
        assert seen == [EngineOptions(n_threads=1, n_ctx=200, block_size=48, seed=4)]

    def test_scheduler_options(self, seen: list[EngineOptions], cli: Cli) -> None:
        words = "--scheduling-policy ssjf --preemption-mode swap --swap-space 1G --max-queue-wait 2.5 --num-scheduler-steps 8"
        words += " --no-async-scheduling --repack-cache 2G"
        assert cli("probe", *words.split(), "--no-enable-prefix-caching")[0] == 0
        assert seen == [
            EngineOptions(
                scheduling_policy="ssjf",
                preemption_mode="swap",
                swap_space=1 << 30,
                max_queue_wait=2.5,
                num_scheduler_steps=8,
                async_scheduling=False,
                enable_prefix_caching=False,
                repack_cache=2 << 30,
            )
        ]
        assert cli("probe", "--scheduling-policy", "lifo")[0] == cli("probe", "--max-queue-wait", "-1")[0] == 2

    def test_config_by_environment(
        self, seen: list[EngineOptions], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "c.toml").write_text('kv-cache-memory = "2G"\nkv-cache-dtype = "f32"\nn-prompt = [1, 2]\n')
        monkeypatch.setenv("PYINFER_CONFIG", str(tmp_path / "c.toml"))
        assert cli("probe")[0] == 0
        assert seen == [EngineOptions(kv_cache_memory=2 << 30, kv_cache_dtype="f32")]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("threds = 1", "unknown key 'threds'; did you mean threads?"),
            ("xyz = 1", "unknown key 'xyz'"),
            ("[probe]\nn-prompt = 1", "unknown key 'n-prompt' in [probe]"),
            ("[servr]\nthreads = 1", "[servr] is not a command"),
            ('threads = "many"', "threads = 'many':"),
            ("threads = 2.5", "threads = '2.5':"),
            ("threads = true", "threads: true and false are no values for this option"),
            ("threads = [[1]]", "threads: a list of plain values"),
            ("threads = 0", "threads = '0':"),
            ('kv-cache-dtype = "q4"', "kv_cache_dtype is 'q4'"),
            ('kv-cache-memory = "lots"', "'lots' is not a size"),
            ("threads = ", "is not valid TOML"),
            ('config = "other.toml"', "unknown key 'config'"),
        ],
    )
    def test_bad_files(self, seen: list[EngineOptions], cli: Cli, tmp_path: Path, text: str, message: str) -> None:
        config = tmp_path / "c.toml"
        config.write_text(text)
        code, _, err = cli("probe", "--config", str(config))
        assert code == 1 and str(config) in err and message in err and err.count("\n") == 1 and seen == []

    def test_missing_file(self, seen: list[EngineOptions], cli: Cli) -> None:
        assert cli("probe", "--config", "/nope.toml") == (
            1, "", "pyinfer: error: --config /nope.toml: No such file or directory\n",
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "value"), [("PYINFER_THREADS", "x"), ("PYINFER_KV_CACHE_DTYPE", "q4"), ("PYINFER_LOG_LEVEL", "loud")]
    )
    def test_bad_variable_is_named(
        self, seen: list[EngineOptions], cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(name, value)
        code, _, err = cli("probe")
        assert code == 1 and f"environment variable {name}='{value}'" in err and err.count("\n") == 1

    def test_bad_flag_is_usage(self, seen: list[EngineOptions], cli: Cli) -> None:
        for args in (["--kv-cache-dtype", "q4"], ["--kv-cache-memory", "x"], ["-ngl", "x"], ["--log-level", "x"]):
            assert cli("probe", *args)[0] == 2

    def test_every_option_has_its_own_variable(self) -> None:
        for name in COMMANDS:
            params = [p for p in load_command(name).params if p.param_type_name == "option" and p.name != "help"]
            names = [p.envvar for p in params]
            assert all(n and n.startswith("PYINFER_") for n in names) and len(set(names)) == len(names), name
            assert {"PYINFER_CONFIG", "PYINFER_DEBUG", "PYINFER_LOG_LEVEL"} <= set(names)
            assert "PYINFER_HOME" not in names
        assert env_name(["-c", "--ctx-size"]) == "PYINFER_CTX_SIZE" and env_name(["-x"]) is None

    @pytest.mark.parametrize(("text", "value"), [("0", 0), ("99", 99), ("auto", "auto"), ("ALL", "all")])
    def test_gpu_layers(self, text: str, value: int | str, seen: list[EngineOptions], cli: Cli) -> None:
        assert cli("probe", "-ngl", text)[0] == 0
        assert seen[0].n_gpu_layers == value

    def test_gpu_memory_utilization(self, seen: list[EngineOptions], cli: Cli) -> None:
        assert cli("probe", "--gpu-memory-utilization", "0.5")[0] == 0
        assert seen[0].gpu_memory_utilization == 0.5 and seen[0].n_gpu_layers == "auto"
        for text in ("0", "1.5", "nan", "much"):
            assert cli("probe", "--gpu-memory-utilization", text)[0] == 2

    def test_gpu_expand(self, seen: list[EngineOptions], cli: Cli) -> None:
        assert cli("probe", "--gpu-expand", "off")[0] == 0
        assert seen[0].gpu_expand == "off"
        assert cli("probe", "--gpu-expand", "some")[0] == 2

    def test_gpu_layers_nonsense(self) -> None:
        with pytest.raises(ConfigError):
            parse_gpu_layers("-1")


def test_lazy_imports_of_the_command_line() -> None:
    """`pyinfer --help` must be quick: none of the heavy packages may be loaded for it."""
    code = (
        "import sys; from pyinfer.cli.entry import run; run(['--help'])\n"
        "heavy = {'numpy', 'numba', 'llvmlite', 'tokenizers', 'fastapi', 'uvicorn', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
