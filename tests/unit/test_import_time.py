"""What importing costs: told by what is loaded, not by the clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyinfer

pytestmark = pytest.mark.unit

HEAVY = {
    "numpy", "numba", "llvmlite", "gguf", "tokenizers", "jinja2", "msgspec", "fastapi", "starlette", "pydantic",
    "uvicorn", "typer", "click", "rich", "prompt_toolkit", "asyncio", "cupy",
}  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    where = str(Path(pyinfer.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('loaded:', *sys.modules)"],
        env=os.environ | {"PYTHONPATH": where},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split("loaded:")[1].split()}


def test_importing_pyinfer_loads_nothing_heavy() -> None:
    assert not loaded_by("import pyinfer") & HEAVY


def test_public_names_are_there() -> None:
    missing = [name for name in pyinfer.__all__ if not hasattr(pyinfer, name)]
    assert not missing


def test_sampling_params_need_no_kernels() -> None:
    loaded = loaded_by("from pyinfer import SamplingParams\nSamplingParams()")
    assert not loaded & {"numba", "llvmlite", "tokenizers", "fastapi", "rich"}


def test_reading_a_file_needs_no_compiler() -> None:
    loaded = loaded_by("import pyinfer.quant.gguf")
    assert "numpy" in loaded
    assert not loaded & {"numba", "llvmlite", "tokenizers", "fastapi", "typer"}


def test_version_command_is_light() -> None:
    loaded = loaded_by("from pyinfer.cli.entry import run\nassert run(['--version']) == 0")
    assert not loaded & {"numpy", "numba", "llvmlite", "tokenizers", "fastapi", "uvicorn"}
