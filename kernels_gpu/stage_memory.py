"""What all programs of a stage share: weights, pages, the step's arrays, the workspace, tables of rope."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Hidden, Op, Value
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.fusion import group_ops
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.matmul_route import RouteTable
from pyinfer.kernels_gpu.mma_tiling import GPU
from pyinfer.kernels_gpu.pages import DevicePages
from pyinfer.kernels_gpu.rope import rope_frequencies
from pyinfer.kernels_gpu.step_buffer import StepBuffer, StepFields
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


class StageMemory:
    """Device memory of one stage. Nothing in it is allocated while a step runs, once its programs are lowered."""

    def __init__(self, device: Device, graph: Graph, config: StageConfig) -> None:
        self.device, self.graph, self.config = device, graph, config
        self.weights = DeviceWeights(device, graph)
        self.pages = DevicePages(device, graph, config)
        self.step = StepBuffer(device, config, len(graph.kv_groups))
        self.fields = [self.step.fields(group) for group in range(len(graph.kv_groups))]
        self.workspace = Workspace(device)
        self.routes = RouteTable(GPU(device.arch, device.n_sms, device.shared_bytes))
        self.copies: dict[int, Buffer] = {}  # address of a packed matrix -> the same in float16, where that is kept
        self.groups = group_ops(graph)
        self._readers = graph.readers()
        self._counters = _Kept()
        self._ropes: dict[int, tuple[Rope, Buffer, Buffer]] = {}
        first = graph.ops[0]
        self.hidden: Buffer | None = None  # float32 [max_tokens, n_embd], what the stage before ended with
        if isinstance(first, Hidden):
            self.hidden = device.alloc(4 * config.max_tokens * first.out.width)
            device.zero(self.hidden)

    def readers(self, value: Value) -> list[Op]:
        """The ops that read a value."""
        return self._readers[id(value)]

    def layer_fields(self, layer: int) -> StepFields:
        """The step's arrays as a KV layer's kernels see them."""
        return self.fields[self.pages.group(layer)]

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
