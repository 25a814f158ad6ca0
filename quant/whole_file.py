"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pyinfer.quant.codec import ByteArray

_one_writer = threading.Lock()  # where a file has one position for all


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` when the block ends well, and replaces what was there.

    Until then it has no name where the file system knows nameless files (Linux's O_TMPFILE), so that not even a killed
    process leaves anything; elsewhere it is a hidden `.NAME.PID.part` beside `path`, removed on any exception.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = _open_nameless(path.parent)
    try:
        with open(partial if descriptor is None else descriptor, "wb") as file:
            yield file
            file.flush()
            if descriptor is not None:
                _give_name(descriptor, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_at(file: BinaryIO, data: ByteArray, offset: int) -> None:
    """Write a contiguous array at an offset, which moves the file's position or not; any thread may."""
    if not hasattr(os, "pwrite"):
        with _one_writer:
            file.seek(offset)
            file.write(data.data)
        return
    left = data.reshape(-1).view(np.uint8).data
    while left:
        n = os.pwrite(file.fileno(), left, offset)
        left, offset = left[n:], offset + n


def _open_nameless(folder: Path) -> int | None:
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise


def _give_name(descriptor: int, path: Path) -> None:
    path.unlink(missing_ok=True)
    root = os.open("/", os.O_RDONLY)
    try:  # naming a folder makes Python call linkat, which follows the link in /proc
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=root, follow_symlinks=True)
    finally:
        os.close(root)
