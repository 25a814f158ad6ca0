"""Merges kept on disk: the same as taken apart anew, repaired when damaged, never a reason to fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyinfer.paths import tokenizers_dir
from pyinfer.runtime import merge_cache
from pyinfer.runtime.merge_cache import merge_pairs

pytestmark = pytest.mark.unit

MERGES = [f"a{i} b{i % 7}" for i in range(30_000)] + ["a1 b1", "  x", "\udcff y", "alone"]
PAIRS = [(f"a{i}", f"b{i % 7}") for i in range(30_000)] + [(" ", "x"), ("\udcff", "y")]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "home"))


def kept() -> list[Path]:
    return sorted(tokenizers_dir().iterdir()) if tokenizers_dir().exists() else []


def test_what_is_read_back_is_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge_pairs(MERGES, "model") == PAIRS
    assert [path.suffix for path in kept()] == [".merges"], "temporary files are left"
    monkeypatch.setattr(merge_cache, "_take_apart", lambda merges: pytest.fail("made again"))
    assert merge_pairs(MERGES, "model") == PAIRS


def test_files_are_told_apart() -> None:
    merge_pairs(MERGES, "model")
    assert merge_pairs(MERGES[:20_000], "model of another time") == PAIRS[:20_000]
    assert len(kept()) == 2


def test_few_merges_are_not_kept() -> None:
    assert merge_pairs(MERGES[:100], "model") == PAIRS[:100]
    assert kept() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: blob[:40],
        lambda blob: blob[:-1],
        lambda blob: blob[:90] + bytes([blob[90] ^ 1]) + blob[91:],
        lambda blob: os.urandom(len(blob)),
    ],
    ids=["empty", "cut", "last byte", "one bit", "noise"],
)
def test_a_damaged_file_is_written_again(damage: Callable[[bytes], bytes]) -> None:
    merge_pairs(MERGES, "model")
    (file,) = kept()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    assert merge_pairs(MERGES, "model") == PAIRS
    assert file.read_bytes() == intact


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PYINFER_HOME", str(tmp_path / "file" / "home"))
    assert merge_pairs(MERGES, "model") == PAIRS


def test_the_files_used_longest_ago_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_cache, "_MOST_FILES", 2)
    for at, name in enumerate(["first", "second"], start=1):
        before = set(kept())
        merge_pairs(MERGES, name)
        (new,) = set(kept()) - before
        os.utime(new, (at, at))
    oldest, second = sorted(kept(), key=lambda path: path.stat().st_mtime)
    merge_pairs(MERGES, "third")
    assert len(kept()) == 2 and oldest not in kept() and second in kept()
