"""Repacked weights on disk: whole or not there, within their limit, never another's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pyinfer.kernels_cpu.repack_cache import RepackCache, make_room
from pyinfer.paths import repack_dir

pytestmark = pytest.mark.unit
MIB = 1 << 20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path))


def weights(n: int = 40 * MIB + 123, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def keep(made_from: str, memory: np.ndarray, limit: int = 1 << 30) -> RepackCache:
    cache = RepackCache(limit, made_from)
    cache.write(memory)
    cache.close()
    return cache


def load(made_from: str, n: int) -> np.ndarray | None:
    memory = np.zeros(n, np.uint8)
    if RepackCache(1 << 30, made_from).read(memory, 2):
        return memory
    assert not memory.any()
    return None


def test_what_was_written_is_read() -> None:
    memory = weights()
    assert load("a", len(memory)) is None
    keep("a", memory)
    np.testing.assert_array_equal(load("a", len(memory)), memory)
    assert load("b", len(memory)) is None and load("a", len(memory) - 1) is None
    assert [path.suffix for path in repack_dir().iterdir()] == [".weights"]


@pytest.mark.parametrize("damage", ["cut", "longer", "unmarked", "empty"])
def test_damaged_file_is_not_read(damage: str) -> None:
    memory = weights(20 * MIB)
    path = keep("a", memory).path
    with path.open("r+b") as file:
        if damage == "cut":
            file.truncate(10 * MIB)
        elif damage == "longer":
            file.truncate(path.stat().st_size + 1)
        elif damage == "empty":
            file.truncate(0)
        else:
            file.write(b"x")
    assert load("a", len(memory)) is None
    keep("a", memory)
    assert load("a", len(memory)) is not None


def test_limit_removes_what_was_used_longest_ago(caplog: pytest.LogCaptureFixture) -> None:
    size = 10 * MIB
    limit = 3 * size + MIB
    for i, name in enumerate("abc"):
        path = keep(name, weights(size, i), limit).path
        os.utime(path, (1000 + i, 1000 + i))
    assert load("a", size) is not None  # now b is the oldest
    keep("d", weights(size, 3), limit)
    assert [load(name, size) is not None for name in "abcd"] == [True, False, True, True]
    keep("e", weights(4 * size), limit)
    assert "more than the repack cache may hold" in caplog.text and load("e", 4 * size) is None
    make_room(repack_dir(), 0)
    assert list(repack_dir().glob("*.weights")) == []


def test_parts_of_dead_writers_are_removed() -> None:
    repack_dir().mkdir(parents=True)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    stale, own = (repack_dir() / f"x.{pid}.part" for pid in (child, os.getpid()))
    stale.touch()
    own.touch()
    keep("a", weights(MIB))
    assert not stale.exists() and own.exists()


def test_folder_that_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    repack_dir().parent.mkdir(parents=True, exist_ok=True)
    repack_dir().touch()  # a file where the folder should be
    keep("a", weights(MIB))
    assert "cannot keep repacked weights" in caplog.text and load("a", MIB) is None
