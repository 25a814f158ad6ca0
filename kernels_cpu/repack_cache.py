"""Repacked weights kept on disk, so that the next start reads them instead of repacking: PYINFER_HOME/repack.

One file for each set of weights, named by a hash of what they were made from and by what; the files together stay within a
limit, the ones not used for longest going first. A file is written beside the running model and renamed when it is whole;
the two words before its weights tell that it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyinfer.paths import repack_dir

_log = logging.getLogger(__name__)
_MAGIC = b"pyinfer1"
_HEADER = 4096  # so that the weights begin on a page
_CHUNK = 16 << 20
_PATIENCE = 10.0  # seconds that closing waits for a write
Bytes = npt.NDArray[np.uint8]


class RepackCache:
    """The file of one set of weights."""

    def __init__(self, limit: int, made_from: str) -> None:
        """`limit`: bytes of all files together. `made_from` names the weights, the layout and the code."""
        self._limit = limit
        self.path = repack_dir() / f"{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.weights"
        self._stop = threading.Event()
        self._writer: threading.Thread | None = None

    def read(self, memory: Bytes, n_threads: int) -> bool:
        """Fill `memory`, which is zero, with the stored weights; False, and zeros, if there are none that fit."""
        try:
            with self.path.open("rb") as file:
                is_whole = file.read(len(_MAGIC) + 8) == _signature(len(memory))
            if not is_whole or self.path.stat().st_size != _HEADER + len(memory):
                return False
            with ThreadPoolExecutor(n_threads, "pyinfer-repack") as pool:
                whole = all(pool.map(lambda at: _read_at(self.path, memory, at), range(0, len(memory), _CHUNK)))
            if whole:
                os.utime(self.path)  # it was used now
                return True
            reason: str | None = "the file ends early"
        except FileNotFoundError:
            return False
        except OSError as error:
            reason = error.strerror
        _log.warning("cannot read repacked weights from %s: %s; they are made again", self.path, reason)
        memory[:] = 0
        return False

    def write(self, memory: Bytes) -> None:
        """Store `memory`, which must not change, on a thread of its own."""
        if _HEADER + len(memory) > self._limit:
            _log.warning(
                "%d bytes of repacked weights are more than the repack cache may hold (%d); they are not kept",
                len(memory), self._limit,
            )  # fmt: skip
            return
        self._writer = threading.Thread(target=self._write, args=(memory,), name="pyinfer-repack", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Let a write end, but not for long; what is not whole by then is removed."""
        if self._writer is not None:
            self._writer.join(_PATIENCE)
            self._stop.set()
            self._writer.join()

    def _write(self, memory: Bytes) -> None:
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale_parts(self.path.parent)
            make_room(self.path.parent, self._limit - _HEADER - len(memory))
            with part.open("wb", buffering=0) as file:
                file.write(_signature(len(memory)).ljust(_HEADER, b"\0"))
                for at in range(0, len(memory), _CHUNK):
                    if self._stop.is_set():
                        return
                    rest = memory[at : at + _CHUNK].data
                    while rest:
                        rest = rest[file.write(rest) :]
            os.replace(part, self.path)
        except OSError as error:
            _log.warning("cannot keep repacked weights in %s: %s", self.path.parent, error.strerror or error)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()


def make_room(folder: Path, limit: int) -> None:
    """Remove the files used longest ago until the others take at most `limit` bytes."""
    stats = sorted(((path.stat(), path) for path in folder.glob("*.weights")), key=lambda pair: pair[0].st_mtime)
    total = sum(stat.st_size for stat, _ in stats)
    for stat, path in stats:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def _signature(n_bytes: int) -> bytes:
    return _MAGIC + n_bytes.to_bytes(8, "little")


def _read_at(path: Path, memory: Bytes, at: int) -> bool:
    """One chunk of the weights; False at an early end."""
    target = memory[at : at + _CHUNK].data
    with path.open("rb", buffering=0) as file:
        file.seek(_HEADER + at)
        while target:
            n = file.readinto(target)
            if not n:
                return False
            target = target[n:]
    return True


def _remove_stale_parts(folder: Path) -> None:
    """Of processes that were killed while they wrote."""
    for path in folder.glob("*.part"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.name.split(".")[-2])
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                path.unlink()
