"""A reading position in a GGUF header: every read is checked against the end of the file and named in its error."""

from __future__ import annotations

import mmap
import struct
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt

from pyinfer.errors import GGUFError

ByteOrder = Literal["<", ">"]  # as in `struct`

_MAX_NAME_BYTES = 65_535  # the specification's limit on keys; a longer one is a corrupt length


def show(value: object) -> str:
    """A value out of a file, fit for one line of an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Cursor:
    """Reads values of either byte order from `buffer` at `offset`, moving on; errors name file, field and offset."""

    def __init__(self, buffer: mmap.mmap | bytes, file_name: str) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.offset = 0
        self.file_name = file_name
        self.set_order("<")

    def set_order(self, order: ByteOrder) -> None:
        self.order = order
        self._u32 = struct.Struct(order + "I")
        self._u64 = struct.Struct(order + "Q")

    def fail(self, what: str, problem: str, at: int | None = None) -> NoReturn:
        raise GGUFError(f"{self.file_name}: {what} at byte {self.offset if at is None else at}: {problem}")

    def need(self, n_bytes: int, what: str) -> None:
        """Check that `n_bytes` more are in the file."""
        if n_bytes > self.size - self.offset:
            left = self.size - self.offset
            self.fail(what, f"needs {n_bytes} bytes, the file has {left} left; it is cut off or corrupt")

    def u32(self, what: str) -> int:
        self.need(4, what)
        value: int = self._u32.unpack_from(self.buffer, self.offset)[0]
        self.offset += 4
        return value

    def u64(self, what: str) -> int:
        self.need(8, what)
        value: int = self._u64.unpack_from(self.buffer, self.offset)[0]
        self.offset += 8
        return value

    def raw(self, n_bytes: int, what: str) -> bytes:
        self.need(n_bytes, what)
        start = self.offset
        self.offset = start + n_bytes
        return self.buffer[start : self.offset]

    def numbers(self, dtype: np.dtype[np.generic], count: int, what: str) -> npt.NDArray[np.generic]:
        """`count` numbers of `dtype` as a fresh array in native order."""
        self.need(count * dtype.itemsize, what)
        array = np.frombuffer(self.buffer, dtype.newbyteorder(self.order), count, self.offset)
        self.offset += count * dtype.itemsize
        return array.astype(dtype)

    def name(self, what: str) -> str:
        """A key or a tensor name: 1 to 65,535 bytes of valid UTF-8."""
        at = self.offset
        length = self.u64(f"length of {what}")
        if not 1 <= length <= _MAX_NAME_BYTES:
            self.fail(f"length of {what}", f"{length} is outside 1..{_MAX_NAME_BYTES}", at)
        try:
            return self.raw(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(what, "not valid UTF-8", at + 8)

    def text(self, what: str) -> str:
        """A string value; bytes that are not UTF-8 become U+FFFD."""
        return self.raw(self.u64(f"length of {what}"), what).decode("utf-8", "replace")

    def texts(self, count: int, what: str) -> list[str]:
        """`count` string values; `s.encode("utf-8", "surrogateescape")` restores bytes that are not UTF-8."""
        self.need(count * 8, what)
        buffer, size, position = self.buffer, self.size, self.offset
        unpack = self._u64.unpack_from
        out: list[str] = []
        append = out.append
        for index in range(count):  # a vocabulary has 262,144 of these: no calls into this class inside the loop
            start = position + 8
            if start > size:
                self.fail(f"{what}[{index}]", "the file is cut off", position)
            position = start + unpack(buffer, start - 8)[0]
            if position > size:
                self.fail(f"{what}[{index}]", f"length {position - start} runs past the end of the file", start - 8)
            append(buffer[start:position].decode("utf-8", "surrogateescape"))
        self.offset = position
        return out
