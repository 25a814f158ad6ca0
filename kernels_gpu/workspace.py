"""Memory for a program's values, reused once their last reader is done and shared by all programs of a stage.

Programs run one after another, so each begins with all slabs free. The largest program is lowered first: those after it find
slabs that are large enough, and no step has to allocate.
"""

from __future__ import annotations

from collections import Counter

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
        self._reads_left[id(graph.logits)] += 1  # the caller reads them
        self._operands: dict[int, tuple[Operand, Buffer]] = {}

    def __getitem__(self, value: Value) -> Operand:
        return self._operands[id(value)][0]

    def write(self, value: Value, form: Form, n_rows: int) -> Operand:
        """Memory for a value that is about to be written."""
        slab = self.scratch(operand_bytes(form, n_rows, value.width))
        operand = operand_at(form, n_rows, value.width, slab)
        self._operands[id(value)] = (operand, slab)
        return operand

    def read(self, *values: Value) -> None:
        """Count the reads of one op; what nobody reads any more can be reused."""
        for value in values:
            self._reads_left[id(value)] -= 1
            if not self._reads_left[id(value)]:
                self.release(self._operands[id(value)][1])

    def scratch(self, n_bytes: int) -> Buffer:
        """Memory until `release`: the smallest slab that is free and large enough."""
        for i, slab in enumerate(self._free):
            if slab.n_bytes >= n_bytes:
                return self._free.pop(i)
        return self._workspace.grow(n_bytes)

    def release(self, slab: Buffer) -> None:
        self._free.append(slab)
        self._free.sort(key=lambda slab: slab.n_bytes)
