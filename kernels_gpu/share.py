"""`DeviceShare`: what a model's stages on one device have in common. They run one after another, so most of their memory is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.held_results import HeldResults
from pyinfer.graph.ops import Value
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.bounds import Lengths
from pyinfer.kernels_gpu.device import Bytes, Device
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.matmul_route import RouteTable
from pyinfer.kernels_gpu.mma_tiling import GPU
from pyinfer.kernels_gpu.pages import DevicePages
from pyinfer.kernels_gpu.rope import rope_frequencies
from pyinfer.kernels_gpu.step_buffer import StepBuffer
from pyinfer.kernels_gpu.weights import DeviceWeights
from pyinfer.kernels_gpu.workspace import Workspace


@dataclass(slots=True)
class _Kept:
    """Memory that must be zero before its first use and is left zero by every launch: counters of blocks that arrived."""

    buffers: list[Buffer] = field(default_factory=list)

    def at_least(self, device: Device, n_bytes: int) -> Buffer:
        for buffer in self.buffers:
            if buffer.n_bytes >= n_bytes:
                return buffer
        buffer = device.alloc(n_bytes)
        device.zero(buffer)
        self.buffers.append(buffer)
        return buffer


class DeviceShare:
    """Weights, pages, the step's arrays, the workspace, tables of rope, and rows on their way between host and device."""

    def __init__(self, device: Device, graphs: Sequence[Graph], config: StageConfig) -> None:
        """Parts that all have the same KV layers."""
        self.device, self.config = device, config
        self.weights = DeviceWeights(device, *graphs)
        self.pages = DevicePages(device, graphs[0], config)
        self.step = StepBuffer(device, config, len(graphs[0].kv_groups))
        self.workspace = Workspace(device)
        self.routes = RouteTable(GPU(device.arch, device.n_sms, device.shared_bytes))
        self.copies: dict[int, Buffer] = {}  # address of a packed matrix -> the same in float16, where that is kept
        self.lengths: dict[int, Lengths] = {}  # address of a matrix for gate or up -> of its rows
        self.n_users = 0
        self._endings: list[Callable[[], None]] = []
        self.results = HeldResults[Bytes]()
        self._free_results: list[Bytes] = []
        self._counters = _Kept()
        self._ropes: dict[int, tuple[Rope, Buffer, Buffer]] = {}
        self._hidden: dict[tuple[str, int], Buffer] = {}
        self._arrivals: dict[int, Buffer] = {}  # id of a value -> where its first reader has it
        self._kept: dict[int, Buffer] = {}  # id of a value that never leaves the device -> where it is
        self._held_rows, self._free_rows = HeldResults[Buffer](), list[Buffer]()

    def counters(self, n_bytes: int) -> Buffer:
        """Zeros, shared by launches that come one after another."""
        return self._counters.at_least(self.device, max(n_bytes, 4))

    def rope(self, rope: Rope) -> tuple[Buffer, Buffer]:
        """(frequencies float64, angles of all tokens of a step float32 [max_tokens, n_dims / 2, 2])."""
        if id(rope) not in self._ropes:
            table = np.ascontiguousarray(rope_frequencies(rope))
            frequencies = self.device.alloc(table.nbytes)
            self.device.upload(frequencies, table)
            angles = self.device.alloc(4 * self.config.max_tokens * rope.n_dims)
            self._ropes[id(rope)] = (rope, frequencies, angles)
        return self._ropes[id(rope)][1:]

    def hidden(self, values: Sequence[Value]) -> dict[int, Buffer]:
        """Where a stage's rows from others arrive, by the values' ids; those of one type and place share memory."""
        found: dict[int, Buffer] = {}
        for place, value in enumerate(values):
            if id(value) in self._kept:
                found[id(value)] = self._kept[id(value)]
                continue
            key = f"{value.dtype} {place}", value.width
            if key not in self._hidden:
                self._hidden[key] = self._rows(value)
            found[id(value)] = self._hidden[key]
            self._arrivals.setdefault(id(value), self._hidden[key])
        return found

    def keep(self, values: Sequence[Value], number: int, last_reader: int) -> dict[int, Buffer]:
        """Where rows stay that a stage makes and only others of this device read, by the values' ids.

        Those are stages that are still to come, or one that is there already, whose memory for them it is then.
        """
        free = self._free_rows
        free += self._held_rows.release_before(number)
        for value in values:
            if id(value) in self._arrivals:
                self._kept[id(value)] = self._arrivals[id(value)]
                continue
            n_bytes = 4 * self.config.max_tokens * value.width
            fitting = [i for i, buffer in enumerate(free) if buffer.n_bytes == n_bytes]
            self._kept[id(value)] = free.pop(fitting[0]) if fitting else self._rows(value)
            self._held_rows.hold(last_reader, [self._kept[id(value)]])
        return {id(value): self._kept[id(value)] for value in values}

    def _rows(self, value: Value) -> Buffer:
        buffer = self.device.alloc(4 * self.config.max_tokens * value.width)
        self.device.zero(buffer)  # padding is computed with too
        return buffer

    def pinned_results(self, number: int, last_reader: int, sizes: Sequence[int]) -> list[Bytes]:
        """Pinned memory of so many bytes each for the results of a stage; of those before it where that is not needed."""
        free = self._free_results
        free += self.results.release_before(number)
        taken = []
        for size in sizes:
            fitting = [i for i, memory in enumerate(free) if memory.nbytes >= size]
            best = min(fitting, key=lambda i: free[i].nbytes, default=None)
            taken.append(self.device.alloc_pinned(size) if best is None else free.pop(best))
        self.results.hold(last_reader, taken)
        return taken

    def leave(self) -> None:
        """One stage less; the last one gives the memory back."""
        self.n_users -= 1
        if self.n_users <= 0:
            self.close()

    def on_close(self, work: Callable[[], None]) -> None:
        """Do this before the memory goes."""
        self._endings.append(work)

    def close(self) -> None:
        for work in self._endings:
            work()
        self._endings.clear()
        self.device.close()
