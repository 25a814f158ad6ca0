"""Files that appear whole or not at all, with and without nameless files."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from pyinfer.errors import GGUFError
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.whole_file import whole_file, write_at
from pyinfer.quant.writer import TensorStream, stream_gguf

pytestmark = pytest.mark.unit


@pytest.fixture(params=["nameless", "hidden"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "hidden":
        unsupported = OSError(errno.EOPNOTSUPP, "no such files here")
        real = os.open

        def no_nameless(path: str, flags: int, mode: int = 0o777) -> int:
            if hasattr(os, "O_TMPFILE") and flags & os.O_TMPFILE == os.O_TMPFILE:
                raise unsupported
            return real(path, flags, mode)

        monkeypatch.setattr(os, "open", no_nameless)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no nameless files")
    return str(request.param)


def test_it_appears_at_the_end(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"abc")
        names = [p.name for p in tmp_path.iterdir()]
        assert names == ([] if kind == "nameless" else [f".file.{os.getpid()}.part"])
    assert path.read_bytes() == b"abc" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_it_replaces_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"older")
    (tmp_path / f".file.{os.getpid()}.part").write_bytes(b"left by a process that was killed")
    with whole_file(path) as file:
        file.write(b"abc")
        assert path.read_bytes() == b"older"
    assert path.read_bytes() == b"abc" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_is_left_after_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"abc")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"older" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_permissions_follow_the_umask(tmp_path: Path, kind: str) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file") as file:
            file.write(b"abc")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_missing_folder(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "none" / "file"):
        pass


@pytest.mark.parametrize("has_pwrite", [True, False])
def test_parts_are_written_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pwrite: bool) -> None:
    if not has_pwrite:
        monkeypatch.delattr(os, "pwrite", raising=False)
    parts = [np.full((2, 5), i, np.uint8) for i in range(20)]
    with whole_file(tmp_path / "file") as file:
        file.write(b"head")
        file.truncate(4 + 200 + 3)
        threads = [threading.Thread(target=write_at, args=(file, part, 4 + 10 * i)) for i, part in enumerate(parts)]
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "file").read_bytes() == b"head" + b"".join(p.tobytes() for p in parts) + bytes(3)


def stream(n_chunks: int) -> TensorStream:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    return TensorStream("F32", (4, 3), lambda: [row.view(np.uint8)[np.newaxis] for row in values[:n_chunks]])


def test_tensors_are_made_one_chunk_after_the_other(tmp_path: Path) -> None:
    path, done = tmp_path / "model.gguf", list[int]()
    stream_gguf(path, {"general.alignment": 64}, {"a": stream(4), "b": stream(4)}, on_bytes=done.append)
    assert done == [12, 24, 36, 48, 60, 72, 84, 96]
    with GGUFFile.open(path) as file:
        for name in ("a", "b"):
            np.testing.assert_array_equal(file.tensors[name].dequantize(), np.arange(12).reshape(4, 3))


@pytest.mark.parametrize("n_chunks", [0, 3])
def test_chunks_that_are_not_the_tensor(tmp_path: Path, n_chunks: int) -> None:
    with pytest.raises(GGUFError, match=rf"'a': F32 of \(4, 3\) takes 48 bytes, not {12 * n_chunks}"):
        stream_gguf(tmp_path / "model.gguf", {}, {"a": stream(n_chunks)})
    assert not list(tmp_path.iterdir())
