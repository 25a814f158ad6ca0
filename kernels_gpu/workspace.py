"""Memory for a program's values, reused once their last reader is done and shared by all programs of a stage.

Programs run one after another, so each begins with all slabs free. The largest program is lowered first: those after it find
slabs that are large enough, and no step has to allocate.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Value
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.operand import Form, Operand, operand_at, operand_bytes


class Workspace:
    """Slabs of device memory, smallest first."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.slabs: list[Buffer] = []

    @property
    def n_bytes(self) -> int:
        return sum(slab.n_bytes for slab in self.slabs)

    def grow(self, n_bytes: int) -> Buffer:
        slab = self._device.alloc(n_bytes)
        self.slabs.append(slab)
        self.slabs.sort(key=lambda slab: slab.n_bytes)
        return slab


class ValuePlan:
    """Hands out slabs in the order ops are lowered, knowing how often each value is still to be read."""

    def __init__(self, workspace: Workspace, graph: Graph) -> None:
        self._workspace = workspace
        self._free = list(workspace.slabs)
        self._reads_left = Counter(id(value) for op in graph.ops for value in op.inputs)
        self._reads_left.update(map(id, graph.results))  # the caller reads them
        self._operands: dict[int, tuple[Operand, Buffer | None]] = {}
        self._holders: Counter[int] = Counter()  # slab -> values that lie in it

    def __getitem__(self, value: Value) -> Operand:
        return self._operands[id(value)][0]

    def __contains__(self, value: Value) -> bool:
        return id(value) in self._operands

    def write(self, value: Value, form: Form, n_rows: int, *, scaled: bool = True, factor: float = 1.0) -> Operand:
        """Memory for a value that is about to be written; an h16 one without `scaled` has no scales of its rows, but `factor`."""
        operand, slab = self.operand_scratch(form, n_rows, value.width)
        if form == "h16" and not scaled:
            operand = replace(operand, scales=None, factor=factor)
        self._operands[id(value)] = (operand, slab)
        self._holders[slab.ptr] += 1
        return operand

    def hold(self, value: Value, operand: Operand) -> None:
        """A value that lies in memory of its own."""
        self._operands[id(value)] = (operand, None)

    def share(self, value: Value, other: Value) -> None:
        """A value that is another one, unchanged."""
        self._operands[id(value)] = self._operands[id(other)]
        slab = self._operands[id(value)][1]
        if slab is not None:
            self._holders[slab.ptr] += 1

    def is_last_read(self, value: Value) -> bool:
        """Whether the op that is being lowered is the last to read what lies in this value's memory."""
        slab = self._operands[id(value)][1]
        return slab is not None and self._reads_left[id(value)] == 1 and self._holders[slab.ptr] == 1

    def read(self, *values: Value) -> None:
        """Count the reads of one op; what nobody reads any more can be reused."""
        for value in values:
            self._reads_left[id(value)] -= 1
            slab = self._operands[id(value)][1]
            if self._reads_left[id(value)] == 0 and slab is not None:
                self._holders[slab.ptr] -= 1
                if not self._holders[slab.ptr]:
                    self.release(slab)

    def operand_scratch(self, form: Form, n_rows: int, width: int) -> tuple[Operand, Buffer]:
        """Rows that are no value of the graph, and what is to be released after them."""
        slab = self.scratch(operand_bytes(form, n_rows, width))
        return operand_at(form, n_rows, width, slab), slab

    def scratch(self, n_bytes: int) -> Buffer:
        """Memory until `release`: the smallest slab that is free and large enough."""
        for i, slab in enumerate(self._free):
            if slab.n_bytes >= n_bytes:
                return self._free.pop(i)
        return self._workspace.grow(n_bytes)

    def release(self, slab: Buffer) -> None:
        self._free.append(slab)
        self._free.sort(key=lambda slab: slab.n_bytes)
