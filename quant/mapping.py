"""A file mapped read-only into memory, and pages of it handed back."""

from __future__ import annotations

import mmap
import stat
from pathlib import Path

import numpy as np

from pyinfer.errors import GGUFError
from pyinfer.quant.codec import ByteArray


class Mapping:
    """`buffer` is the mapped file, `array` its bytes as uint8 (size,). The file must not shrink while it is mapped."""

    def __init__(self, path: Path) -> None:
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait forever
                raise GGUFError(f"{path}: not a regular file")
            with path.open("rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise GGUFError(f"{path}: the file is empty") from None
        except OSError as error:
            raise GGUFError(f"{path}: cannot be opened: {error.strerror}") from None
        self.path = path
        self.size = len(self.buffer)
        self.array: ByteArray = np.frombuffer(self.buffer, np.uint8)
        self._address: int = self.array.__array_interface__["data"][0]

    def release(self, view: ByteArray) -> None:
        """Let the OS drop the pages wholly inside `view`, a contiguous part of `array`; a read fetches them again."""
        if not hasattr(self.buffer, "madvise"):  # not on Windows
            return
        first = view.__array_interface__["data"][0] - self._address
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self.buffer.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Unmap now, or when the last array that looks into the file is gone."""
        self.array = np.empty(0, np.uint8)
        try:
            self.buffer.close()
        except BufferError:
            return  # views still alive keep the mapping, which the garbage collector closes after them
