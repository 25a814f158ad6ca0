"""What a plan says of each device: the parts of the graph that run there and the bytes that they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyinfer.graph.backend import DeviceInfo, StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, Hidden
from pyinfer.graph.split import expandable_weights, weights_of
from pyinfer.quant.tensor import QuantTensor
from pyinfer.runtime.sizes import format_binary

# CUDA context, cuBLAS workspace, CUDA graphs, loaded kernels, slices of matrices in float16, attention's partial sums
_FIXED = 512 << 20
OUTPUTS = 256  # rows that go through the head at once, if there are not more sequences
_ALIGNMENT = 1.02  # packed weights end at multiples of 16 and of 256 bytes


@dataclass(frozen=True, slots=True, eq=False)
class StagePlan:
    """A device's part of a model, or a nameable part of that: one stage, or several with those of other devices between."""

    graphs: tuple[Graph, ...]
    numbers: tuple[int, ...]  # of each in the order of execution, over all devices
    device: DeviceInfo | None  # None: the CPU
    what: str  # "blocks 0 to 15", "head"
    weight_bytes: int
    page_bytes: int  # of one KV page
    buffer_bytes: int
    copy_bytes: int = 0  # float16 copies of matrices (`StageConfig.gpu_expand`)

    def n_bytes(self, n_pages: int) -> int:
        return self.weight_bytes + self.copy_bytes + self.buffer_bytes + n_pages * self.page_bytes


def stage_plan(
    parts: Sequence[tuple[int, Graph]], device: DeviceInfo | None, what: str, config: StageConfig
) -> StagePlan:
    """Of numbered parts that share a device's pages and buffers."""
    graphs = tuple(graph for _, graph in parts)
    has_pages = any(isinstance(op, Attention) for graph in graphs for op in graph.ops)
    buffers = copies = 0
    if device is not None:
        buffers = max(buffer_bytes(graph, config) for graph in graphs)
        copies = sum(map(copies_bytes, graphs)) if config.gpu_expand else 0
    return StagePlan(
        graphs,
        tuple(number for number, _ in parts),
        device,
        what,
        weight_bytes(*graphs),
        kv_page_bytes(graphs[0], config.block_size, config.kv_dtype) if has_pages else 0,
        buffers,
        copies,
    )


def stage_lines(stages: Iterable[StagePlan], n_pages: int, utilization: float) -> list[str]:
    """The plan as people read it, a line for each."""
    lines = []
    for stage in stages:
        device = "CPU" if stage.device is None else f"GPU {stage.device.index} ({stage.device.name})"
        parts = [f"weights {format_binary(stage.weight_bytes)}"]
        if stage.copy_bytes:
            parts.append(f"float16 copies {format_binary(stage.copy_bytes)}")
        if stage.page_bytes:
            parts.append(f"KV {format_binary(n_pages * stage.page_bytes)}")
        if stage.device is not None:
            parts.append(f"buffers {format_binary(stage.buffer_bytes)}")
            parts.append(f"of {format_binary(room(stage.device, utilization))} usable")
        lines.append(f"{device}: {stage.what}; {', '.join(parts)}")
    return lines


def room(device: DeviceInfo, utilization: float) -> int:
    """Bytes that we may still take: `utilization` of all, less what others have taken."""
    return max(0, int(utilization * device.total) - (device.total - device.free))


def weight_bytes(*graphs: Graph) -> int:
    """Of the matrices as they lie on a device, each once."""
    return aligned_bytes(weight for graph in graphs for weight in weights_of(graph))


def aligned_bytes(weights: Iterable[QuantTensor]) -> int:
    """What these matrices take on a device, each once."""
    return int(sum({id(weight.data): weight.data.nbytes for weight in weights}.values()) * _ALIGNMENT)


def copies_bytes(graph: Graph) -> int:
    """Of float16 copies of the matrices."""
    return sum(2 * weight.n_elements for weight in expandable_weights(graph))


def buffer_bytes(graph: Graph, config: StageConfig) -> int:
    """An upper bound for activations and what the libraries take. Few of a step's rows go through the head."""
    rows = {"tokens": config.max_tokens, "outputs": min(config.max_tokens, max(OUTPUTS, config.max_sequences))}
    last_read = {id(value): index for index, op in enumerate(graph.ops) for value in op.inputs}
    last_read.update((id(value), len(graph.ops)) for value in graph.results)
    alive: dict[int, int] = {}
    peak = arriving = 0
    for index, op in enumerate(graph.ops):
        made = {id(value): 4 * value.width * rows[value.rows] for value in op.outputs}
        arriving += sum(made.values()) if isinstance(op, Hidden) else 0
        alive |= made
        peak = max(peak, sum(alive.values()))
        alive = {key: size for key, size in alive.items() if last_read.get(key, -1) > index}
    return _FIXED + 2 * peak + arriving
