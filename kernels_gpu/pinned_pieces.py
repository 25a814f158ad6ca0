"""`PinnedPieces`: how host memory that is not pinned comes to a device, in the order of one stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
_PIECE = 16 << 20  # bytes of each of two
_ALIGNMENT = 64


class PinnedPieces:
    """Two pinned pieces in turn: one is filled while the other is copied from.

    CUDA would copy from pageable memory as well, but where a GPU reads that in place (Grace, HMM) it may return before it has.
    """

    def __init__(self, runtime: Any, stream: int, alloc_pinned: Callable[[int], Bytes]) -> None:
        """`runtime` is CUDA's as CuPy has it."""
        self._runtime, self._stream = runtime, stream
        flags = runtime.eventDisableTiming
        self._pieces = [(alloc_pinned(_PIECE), int(runtime.eventCreateWithFlags(flags))) for _ in range(2)]
        self._used = 0  # bytes of the first, which is the one that is being filled

    def copy(self, target: int, source: npt.NDArray[Any]) -> None:
        """Of a contiguous array to this address; the array may change once the call is back."""
        raw, start = source.reshape(-1).view(np.uint8), 0
        while start < raw.nbytes:
            if self._used >= _PIECE:
                self._turn()
            piece = self._pieces[0][0][self._used :]
            n = min(len(piece), raw.nbytes - start)
            piece[:n] = raw[start : start + n]
            kind = self._runtime.memcpyHostToDevice
            self._runtime.memcpyAsync(target + start, piece.ctypes.data, n, kind, self._stream)
            self._used += -(-n // _ALIGNMENT) * _ALIGNMENT
            start += n

    def _turn(self) -> None:
        """The other piece is next, once nothing is copied from it any more."""
        self._runtime.eventRecord(self._pieces[0][1], self._stream)
        self._pieces.reverse()
        self._runtime.eventSynchronize(self._pieces[0][1])
        self._used = 0

    def close(self) -> None:
        """After the stream has been waited for."""
        for _, event in self._pieces:
            self._runtime.eventDestroy(event)
