"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tiny_models"]  # tests/support/tiny_models.py

LARGE_MODELS = frozenset({"qwen2.5-coder-1.5b"})
MOST_WORKERS = 4  # each holds models of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx", type=int, choices=(75, 80, 90), help="GPU tests run the PTX that NVRTC makes for this architecture"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ptx") is not None:
        from ptx_emulator.device import install

        install(config.getoption("--ptx"))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A plain run goes to a worker for each core, where there is xdist; one that chooses tests stays in this process."""
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ or getattr(option, "numprocesses", 0) is not None:
        return  # a worker has no workers; `-n` says what it wants; 0: no xdist
    plain = config.args_source is pytest.Config.ArgsSource.TESTPATHS and option.markexpr == "not large"
    if plain and not (option.keyword or option.usepdb or option.collectonly):
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if n_cores > 1:
            option.numprocesses, option.dist = min(MOST_WORKERS, n_cores), "worksteal"


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """What tests start ends by SIGINT, though a shell that put pytest in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_path(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`model_path(name)`: the file of a catalogue model, pulled once into PYINFER_HOME and kept between runs.

    A model of `LARGE_MODELS` is only for tests marked `large`: anything else would download it in a plain run.
    """
    from pyinfer.runtime.hub import resolve
    from pyinfer.runtime.progress import SilentProgress

    large_left_out = "not large" in str(request.config.getoption("markexpr"))
    paths: dict[str, Path] = {}

    def path_of(name: str) -> Path:
        if name in LARGE_MODELS and large_left_out:
            pytest.fail(f"{name} is a large download: mark this test `large`")
        if name not in paths:
            paths[name] = resolve(name, SilentProgress())
        return paths[name]

    return path_of


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PYINFER_HOME and no other PYINFER_ variables."""
    for key in [key for key in os.environ if key.startswith("PYINFER_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        from pyinfer.cli.entry import run

        code = run(list(args))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
