"""`SideCopies`: a second stream of a CUDA device, which brings host memory while the first computes.

Slots order the two: copies to a slot wait until the main stream is done with what was there, and it waits for them. Host memory
that could not be pinned in place goes through two pinned pieces in turn; then the calling thread does the copying.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.pinned_pieces import Bytes, PinnedPieces

PORTABLE, READ_ONLY = 1, 8  # cudaHostRegisterPortable, cudaHostRegisterReadOnly


class SideCopies:
    """Belongs to one device, which is the current one wherever its methods are called."""

    def __init__(self, runtime: Any, main: int, alloc_pinned: Callable[[int], Bytes]) -> None:
        """`runtime` is CUDA's as CuPy has it, `main` the stream that computes."""
        self._runtime, self._main, self._alloc_pinned = runtime, main, alloc_pinned
        self._stream = int(runtime.streamCreateWithFlags(runtime.streamNonBlocking))
        self._copied: dict[int, int] = {}  # slot -> the event behind its copies
        self._ended: dict[int, int] = {}  # slot -> the event behind what reads it
        self._pieces: PinnedPieces | None = None
        self._registered: list[tuple[int, int]] = []
        self._memory: list[npt.NDArray[Any]] = []  # what was pinned, so that it stays

    def pin(self, arrays: Sequence[npt.NDArray[Any]]) -> bool:
        """Have these, as parts of a mapped file, pinned where they are; False if the system does not do that."""
        done: list[tuple[int, int]] = []
        for first, end in page_spans(arrays):
            try:
                self._runtime.hostRegister(first, end - first, PORTABLE | READ_ONLY)
            except self._runtime.CUDARuntimeError:
                self._unpin(done)
                if self._pieces is None:
                    self._pieces = PinnedPieces(self._runtime, self._stream, self._alloc_pinned)
                return False
            done.append((first, end))
        self._registered += done
        self._memory += arrays
        return True

    def copy(self, slot: int, copies: Sequence[tuple[Buffer, npt.NDArray[Any]]]) -> None:
        """Of contiguous arrays, in the order of calls."""
        runtime = self._runtime
        if slot in self._ended:
            runtime.streamWaitEvent(self._stream, self._ended[slot])
        for target, source in copies:
            assert source.flags.c_contiguous and source.nbytes == target.n_bytes
            if self.is_pinned(source):
                kind = runtime.memcpyHostToDevice
                runtime.memcpyAsync(target.ptr, source.ctypes.data, source.nbytes, kind, self._stream)
            else:
                assert self._pieces is not None, "`pin` comes first"
                self._pieces.copy(target.ptr, source)
        if slot not in self._copied:
            self._copied[slot] = self._event()
        runtime.eventRecord(self._copied[slot], self._stream)

    def wait(self, slot: int) -> None:
        """The main stream goes on when the slot's copies are there."""
        self._runtime.streamWaitEvent(self._main, self._copied[slot])

    def end(self, slot: int) -> None:
        """The slot's next copies come behind what the main stream was asked for so far."""
        if slot not in self._ended:
            self._ended[slot] = self._event()
        self._runtime.eventRecord(self._ended[slot], self._main)

    def close(self) -> None:
        runtime = self._runtime
        runtime.streamSynchronize(self._stream)
        self._unpin(self._registered)
        self._registered, self._memory = [], []
        for event in (*self._copied.values(), *self._ended.values()):
            runtime.eventDestroy(event)
        if self._pieces is not None:
            self._pieces.close()
        runtime.streamDestroy(self._stream)

    def _event(self) -> int:
        return int(self._runtime.eventCreateWithFlags(self._runtime.eventDisableTiming))

    def is_pinned(self, source: npt.NDArray[Any]) -> bool:
        """Whether `pin` has pinned all of it."""
        start = source.ctypes.data
        return any(first <= start and start + source.nbytes <= end for first, end in self._registered)

    def _unpin(self, spans: Sequence[tuple[int, int]]) -> None:
        for first, _ in spans:
            self._runtime.hostUnregister(first)


def page_spans(arrays: Sequence[npt.NDArray[Any]]) -> list[tuple[int, int]]:
    """Addresses [first, end) of the pages that hold these arrays, each page once."""
    size, spans = mmap.PAGESIZE, list[tuple[int, int]]()
    for array in sorted(arrays, key=lambda array: array.ctypes.data):
        first = array.ctypes.data // size * size
        end = -(-(array.ctypes.data + array.nbytes) // size) * size
        if spans and first <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((first, end))
    return spans
