"""What all programs of a stage share: its values, and what it has in common with the other stages of its device."""

from __future__ import annotations

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Hidden, Op, Value
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.fusion import group_ops
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.share import DeviceShare
from pyinfer.kernels_gpu.step_buffer import StepFields
from pyinfer.kernels_gpu.weight_stream import PartStream
from pyinfer.kernels_gpu.weights import DeviceWeights


class StageMemory:
    """Device memory of one stage. Nothing in it is allocated while a step runs, once its programs are lowered."""

    def __init__(
        self,
        device: Device,
        graph: Graph,
        config: StageConfig,
        share: DeviceShare | None = None,
        stream: PartStream | None = None,
    ) -> None:
        """With a `stream` the matrices are those that it brings."""
        self.device, self.graph, self.config = device, graph, config
        self.share = share or DeviceShare(device, [graph], config)
        self.weights: DeviceWeights | PartStream = stream or self.share.weights
        self.copies, self.lengths = self.share.copies, self.share.lengths
        self.workspace, self.routes = self.share.workspace, self.share.routes
        self.pages, self.step = self.share.pages, self.share.step
        self.fields = [self.step.fields(group) for group in range(len(graph.kv_groups))]
        self.groups = group_ops(graph)
        self.hidden_values = [op.out for op in graph.ops if isinstance(op, Hidden)]
        self.hidden = self.share.hidden(self.hidden_values)  # rows of stages before, by the id of their value
        self._readers = graph.readers()

    def readers(self, value: Value) -> list[Op]:
        """The ops that read a value."""
        return self._readers[id(value)]

    def layer_fields(self, layer: int) -> StepFields:
        """The step's arrays as a KV layer's kernels see them."""
        return self.fields[self.pages.group(layer)]

    def counters(self, n_bytes: int) -> Buffer:
        """See `DeviceShare`."""
        return self.share.counters(n_bytes)

    def rope(self, rope: Rope) -> tuple[Buffer, Buffer]:
        """See `DeviceShare`."""
        return self.share.rope(rope)
