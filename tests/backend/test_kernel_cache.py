"""Compiled kernels on disk: kept, checked, repaired, and never a reason to fail."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_kernels import ISAS, call, step_header

from pyinfer.kernels_cpu.compiler import Compiler, cache_folder
from pyinfer.kernels_cpu.isa import make_isa
from pyinfer.kernels_cpu.opcode import OpField

pytestmark = pytest.mark.backend

TinyModel = Callable[..., Path]


def _double(e: Any, op: Any, step: Any, first: Any, last: Any, scratch: Any) -> None:
    """target[t] = 2 t"""
    target = e.ptr(e.field(op, OpField.ARGS))
    with e.loop(last, first) as t:
        e.store(e.mul(t, 2), e.at(target, e.mul(t, 8)), 8)


def compile_and_run(isa: str = ISAS[0]) -> list[str]:
    """A new process's compiler in all but name: the kernels that it had to build, after checking what they do."""
    compiler = Compiler(make_isa(isa))
    built: list[str] = []
    compiler.on_compile = built.append
    target = np.zeros(5, np.int64)
    call(compiler.kernel("test_double", _double), {OpField.ARGS: target.ctypes.data}, step_header(), 5)
    assert target.tolist() == [0, 2, 4, 6, 8]
    return built


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def kept(home: Path) -> Path:
    (file,) = home.rglob("test_double.o")
    return file


def test_a_kernel_is_built_once(home: Path) -> None:
    assert compile_and_run() == ["test_double"]
    assert compile_and_run() == []
    kept(home).unlink()
    assert compile_and_run() == ["test_double"]
    assert [path.name for path in kept(home).parent.iterdir()] == ["test_double.o"], "temporary files are left"


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: blob[:20],
        lambda blob: blob[: len(blob) // 2],
        lambda blob: blob[:-1],
        lambda blob: blob[:100] + bytes([blob[100] ^ 1]) + blob[101:],
        lambda blob: bytes([blob[0] ^ 128]) + blob[1:],
        lambda blob: blob + b"\0",
        lambda blob: os.urandom(len(blob)),
    ],
    ids=["empty", "in the digest", "half", "last byte", "one bit", "digest", "longer", "noise"],
)
def test_a_damaged_kernel_is_built_again(damage: Callable[[bytes], bytes], home: Path) -> None:
    compile_and_run()
    intact = kept(home).read_bytes()
    kept(home).write_bytes(damage(intact))
    assert compile_and_run() == ["test_double"]
    assert kept(home).read_bytes() == intact
    assert compile_and_run() == []


def test_each_isa_and_each_cpu_has_its_own_folder(home: Path) -> None:
    for isa in ISAS:
        assert compile_and_run(isa) == ["test_double"]
    assert len(set(home.rglob("test_double.o"))) == len(ISAS)
    here = make_isa("portable")
    other = dataclasses.replace(here, features=here.features + ",+sse3")
    assert cache_folder(here) == cache_folder(other)
    assert Compiler(here)._folder != Compiler(other)._folder


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "file" / "home"))
    assert compile_and_run() == ["test_double"]
    assert compile_and_run() == ["test_double"]


def test_an_object_that_cannot_be_replaced_only_costs_time(home: Path) -> None:
    compile_and_run()
    file = kept(home)
    file.unlink()
    file.mkdir()  # neither readable nor replaceable, for root too
    assert compile_and_run() == ["test_double"]
    assert [path.name for path in file.parent.iterdir()] == ["test_double.o"], "temporary files are left"


# ---- whole processes
RUN = """
    import hashlib, sys
    sys.path.insert(0, sys.argv[2])
    from batches import run_prompt
    from pyinfer.graph.backend import StageConfig
    from pyinfer.graph.passes import optimize
    from pyinfer.kernels_cpu.backend import CPUBackend
    from pyinfer.quant.gguf import GGUFFile
    from pyinfer.runtime.models.registry import build_graph

    built = []
    note = lambda what, share: built.append(what) if what.startswith("compiling") else None
    graph = optimize(build_graph(GGUFFile.open(sys.argv[1])))
    stage = CPUBackend().open_stage(graph, StageConfig(n_pages=4, n_ctx=64, n_threads=2, max_tokens=32), note)
    logits = run_prompt(stage, list(range(30)), [2, 1], 16)
    stage.close()
    print(hashlib.sha256(logits.tobytes()).hexdigest(), len(built), "numba" in sys.modules)
"""


def start(path: Path, home: Path) -> subprocess.Popen[str]:
    support = Path(__file__).parents[1] / "support"
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), str(path), str(support)],
        env={**os.environ, "PYINFER_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, int, bool]:
    """(digest of the logits, kernels built, whether Numba was imported)"""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    digest, n_built, has_numba = out.split()
    return digest, int(n_built), has_numba == "True"


@pytest.fixture(scope="module")
def started_twice(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A model, the home that two processes filled together, and their digests."""
    path, home = tiny_model("llama", "Q8_0"), tmp_path_factory.mktemp("started_twice") / "home"
    return path, home, [finish(process)[0] for process in [start(path, home), start(path, home)]]


def test_two_processes_with_one_empty_cache(started_twice: tuple[Path, Path, list[str]]) -> None:
    path, home, digests = started_twice
    assert digests[0] == digests[1]
    assert finish(start(path, home)) == (digests[0], 0, False)
    assert not [file for file in home.rglob("*") if file.name.startswith("tmp")], "temporary files are left"


def test_a_process_without_any_cache(started_twice: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    path, _, digests = started_twice
    (tmp_path / "file").write_text("not a folder")
    digest, n_built, has_numba = finish(start(path, tmp_path / "file" / "home"))
    assert n_built > 0 and has_numba and digest == digests[0]
