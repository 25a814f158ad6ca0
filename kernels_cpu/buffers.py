"""Where a graph's values live: buffers that are reused once their last reader is done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Hidden, Value
from pyinfer.kernels_cpu.activation_a8 import row_bytes
from pyinfer.kernels_cpu.memory import address, allocate


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory for `rows` rows; float rows are padded to 16 columns."""

    memory: npt.NDArray[np.uint8]
    stride: int  # bytes a row

    @property
    def address(self) -> int:
        return address(self.memory)


def stride_of(value: Value) -> int:
    if value.dtype == "a8":
        return row_bytes(value.width)
    return -(-value.width // 32) * 64 if value.dtype == "bf16" else -(-value.width // 16) * 64


class BufferPlan:
    """Hands out buffers in the order ops are lowered, knowing how often each value is still to be read."""

    def __init__(self, graph: Graph, max_rows: int, free: list[npt.NDArray[np.uint8]] | None = None) -> None:
        """`free` is memory to begin with, and where what can be used again is put."""
        self._max_rows = max_rows
        self._reads_left = Counter(id(value) for op in graph.ops for value in op.inputs)
        self._reads_left.update(map(id, graph.results))  # the caller reads them
        self._reads_left.update(
            id(op.out) for op in graph.ops if isinstance(op, Hidden)
        )  # nor is what it gives written over
        self._of: dict[int, Buffer] = {}
        self._free = [] if free is None else free

    def __getitem__(self, value: Value) -> Buffer:
        return self._of[id(value)]

    def write(self, value: Value) -> Buffer:
        """A buffer for a value that is about to be written."""
        stride = stride_of(value)
        memory = self._take(stride * self._max_rows)
        if memory is None:
            memory = allocate(stride * self._max_rows)
        self._of[id(value)] = Buffer(memory, stride)
        return self._of[id(value)]

    def write_over(self, value: Value, old: Value) -> Buffer:
        """Like `write`, but in place of `old` when this is its last read: for ops that read an element before they write it."""
        if self._reads_left[id(old)] == 1 and stride_of(value) == stride_of(old):
            self._of[id(value)] = self._of[id(old)]
            self._reads_left[id(old)] = 0
            return self._of[id(value)]
        return self.write(value)

    def read(self, *values: Value) -> None:
        """Count the reads of one op; what nobody reads any more can be reused."""
        for value in values:
            if self._reads_left[id(value)] > 0:
                self._reads_left[id(value)] -= 1
                if self._reads_left[id(value)] == 0:
                    self._free.append(self._of[id(value)].memory)

    def release(self, buffer: Buffer) -> None:
        """Give back the buffer of a value that is not in the graph."""
        self._free.append(buffer.memory)

    def _take(self, n_bytes: int) -> npt.NDArray[np.uint8] | None:
        for i, memory in enumerate(self._free):
            if len(memory) == n_bytes:
                return self._free.pop(i)
        return None
