"""Which parts of a model go to which device: `plan_offload` decides from free memory, before anything is loaded.

The first blocks stay on the CPU and the last go to the GPUs, so that rows hop once. `-ngl N` moves N blocks, `all` the
embedding and the head too, `auto` as much as fits: the head first, which is worth a few blocks and whose rows are only
those whose logits are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import DeviceInfo, StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.graph.split import block_cuts, expandable_weights, split_graph, weights_of
from pyinfer.graph.tensor_split import shard_graph
from pyinfer.runtime.sizes import format_binary

GPULayers = int | Literal["auto", "all"]
GPUExpand = Literal["auto", "on", "off"]
GPUSplit = Literal["layer", "tensor"]
GPU_SPLIT: tuple[GPUSplit, ...] = ("layer", "tensor")
GPU_EXPAND: tuple[GPUExpand, ...] = ("auto", "on", "off")
# CUDA context, cuBLAS workspace, CUDA graphs, loaded kernels, slices of matrices in float16, attention's partial sums
_FIXED = 512 << 20
_OUTPUTS = 256  # rows that go through the head at once, if there are not more sequences
_ALIGNMENT = 1.02  # packed weights end at multiples of 16 and of 256 bytes


@dataclass(frozen=True, slots=True)
class Offload:
    """What is on GPUs: the last `n_blocks` blocks, and maybe what is before the first and after the last."""

    n_blocks: int
    has_head: bool = False
    has_embedding: bool = False

    @property
    def n_layers(self) -> int:
        """As llama.cpp counts: the head is a layer."""
        return self.n_blocks + self.has_head


@dataclass(frozen=True, slots=True, eq=False)
class StagePlan:
    """One stage: a part of the graph on a device, and the bytes that it takes there."""

    graph: Graph
    device: DeviceInfo | None  # None: the CPU
    what: str  # "blocks 0 to 15", "head"
    weight_bytes: int
    page_bytes: int  # of one KV page
    buffer_bytes: int
    copy_bytes: int = 0  # float16 copies of matrices (`StageConfig.gpu_expand`)

    def n_bytes(self, n_pages: int) -> int:
        return self.weight_bytes + self.copy_bytes + self.buffer_bytes + n_pages * self.page_bytes


@dataclass(frozen=True, slots=True, eq=False)
class OffloadPlan:
    """Stages in order of execution."""

    offload: Offload
    stages: tuple[StagePlan, ...]
    utilization: float
    is_tensor: bool = False  # the stages are ranks of a tensor split, which work at the same time

    @property
    def host_weight_bytes(self) -> int:
        return sum(stage.weight_bytes for stage in self.stages if stage.device is None)

    @property
    def is_all(self) -> bool:
        """Nothing runs on the CPU."""
        return all(stage.device is not None for stage in self.stages)

    @property
    def page_bytes(self) -> int:
        return sum(stage.page_bytes for stage in self.stages)

    def max_pages(self) -> int:
        """KV pages for which every GPU has room; less than 0 if a GPU lacks room even without any."""
        rooms = []
        for stage in self.stages:
            if stage.device is not None:
                left = room(stage.device, self.utilization) - stage.n_bytes(0)
                rooms.append(-1 if left < 0 else left // stage.page_bytes if stage.page_bytes else 1 << 40)
        return min(rooms, default=1 << 40)

    def lines(self, n_pages: int) -> list[str]:
        """The plan as people read it, a line a stage."""
        lines = []
        for stage in self.stages:
            device = "CPU" if stage.device is None else f"GPU {stage.device.index} ({stage.device.name})"
            parts = [f"weights {format_binary(stage.weight_bytes)}"]
            if stage.copy_bytes:
                parts.append(f"float16 copies {format_binary(stage.copy_bytes)}")
            if stage.page_bytes:
                parts.append(f"KV {format_binary(n_pages * stage.page_bytes)}")
            if stage.device is not None:
                parts.append(f"buffers {format_binary(stage.buffer_bytes)}")
                parts.append(f"of {format_binary(room(stage.device, self.utilization))} usable")
            lines.append(f"{device}: {stage.what}; {', '.join(parts)}")
        return lines


def room(device: DeviceInfo, utilization: float) -> int:
    """Bytes that we may still take: `utilization` of all, less what others have taken."""
    return max(0, int(utilization * device.total) - (device.total - device.free))


def wanted(layers: GPULayers, n_blocks: int) -> Offload:
    """What `-ngl` asks for; more layers than there are blocks mean all, as in llama.cpp."""
    if isinstance(layers, int) and layers <= n_blocks:
        return Offload(layers)
    return Offload(n_blocks, has_head=True, has_embedding=True)


def candidates(layers: GPULayers, n_blocks: int) -> Iterator[Offload]:
    """What was asked for, then less and less, down to nothing."""
    first = wanted(layers, n_blocks)
    yield first
    most = n_blocks if first.has_head else first.n_blocks - 1
    for n in range(most, 0, -1):
        yield Offload(n, has_head=first.has_head)
    if first != Offload(0):
        yield Offload(0)


def plan_offload(
    graph: Graph, config: StageConfig, devices: Sequence[DeviceInfo], layers: GPULayers, utilization: float
) -> OffloadPlan:
    """The largest of the `candidates` that leaves room for the KV pages of `config`."""
    for offload in candidates(layers, len(graph.kv_layers)):
        plan = make_plan(graph, config, devices, offload, utilization)
        if plan.max_pages() >= config.n_pages:
            return plan
    raise AssertionError("nothing on a GPU always fits")


def make_tensor_plan(
    graph: Graph, config: StageConfig, devices: Sequence[DeviceInfo], offload: Offload, utilization: float
) -> OffloadPlan:
    """An equal part of every block on each GPU, of a graph that is not yet optimized; ConfigError if that is not possible."""
    shards = [optimize(shard) for shard in shard_graph(graph, len(devices))]
    what = f"1/{len(devices)} of every block and of the head"
    stages = (_stage(shard, device, what, config) for shard, device in zip(shards, devices, strict=True))
    return OffloadPlan(offload, tuple(stages), utilization, is_tensor=True)


def make_plan(
    graph: Graph, config: StageConfig, devices: Sequence[DeviceInfo], offload: Offload, utilization: float
) -> OffloadPlan:
    """Where everything goes for this offload, whether it fits or not; blocks are shared out over the GPUs."""
    n = len(graph.kv_layers)
    if not offload.n_layers:
        return OffloadPlan(offload, (_stage(graph, None, "all", config),), utilization)
    cuts = block_cuts(graph)
    first = n - offload.n_blocks
    parts = split_graph(graph, cuts)  # embedding, blocks, head
    costs = [weight_bytes(part) + config.n_pages * _page_bytes(part, config) for part in parts[1 + first : n + 1]]
    shares = divide(costs, [room(device, utilization) for device in devices])
    ends = [first + sum(shares[: i + 1]) for i in range(len(shares))]
    # (first unit, last unit + 1, device): the embedding is unit 0, block i is unit i + 1, the head is the last
    starts = [0 if offload.has_embedding else first + 1, *(end + 1 for end in ends)]
    pieces: list[tuple[int, int, DeviceInfo | None]] = [(0, starts[0], None)]
    pieces += [(a, b, device) for a, b, device in zip(starts, starts[1:], devices, strict=False)]
    a, b, last = pieces.pop()
    pieces.append((a, b + 1, last) if offload.has_head else (a, b, last))
    pieces.append((pieces[-1][1], n + 2, None))
    pieces = [piece for piece in pieces if piece[0] < piece[1]]
    graphs = split_graph(graph, [cuts[start - 1] for start, _, _ in pieces[1:]])
    stages = (
        _stage(part, device, _name(start, end, n), config)
        for part, (start, end, device) in zip(graphs, pieces, strict=True)
    )
    return OffloadPlan(offload, tuple(stages), utilization)


def divide(costs: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """How many of the items, in order, each device takes: in proportion to its room."""
    total, available = sum(costs), max(1, sum(rooms))
    counts, done, share = [], 0, 0.0
    taken = 0.0
    for device_room in rooms[:-1]:
        share += total * device_room / available
        count = 0
        while done + count < len(costs) and taken + costs[done + count] / 2 <= share:
            taken += costs[done + count]
            count += 1
        counts.append(count)
        done += count
    return [*counts, len(costs) - done]


def check_layers(layers: object) -> None:
    """ConfigError unless this is a number of layers, "auto" or "all"."""
    is_number = isinstance(layers, int) and not isinstance(layers, bool) and layers >= 0
    if not is_number and layers not in ("auto", "all"):
        raise ConfigError(f"n_gpu_layers is {layers!r}; give a number of layers, 'auto' or 'all'", param="n_gpu_layers")


def weight_bytes(graph: Graph) -> int:
    """Of the matrices as they lie on a device, each once."""
    return int(sum(weight.data.nbytes for weight in weights_of(graph)) * _ALIGNMENT)


def copies_bytes(graph: Graph) -> int:
    """Of float16 copies of the matrices."""
    return sum(2 * weight.n_elements for weight in expandable_weights(graph))


def keeps_copies(
    graph: Graph,
    config: StageConfig,
    devices: Sequence[DeviceInfo],
    offload: Offload,
    utilization: float,
    mode: GPUExpand,
) -> bool:
    """Whether GPUs keep float16 copies: `auto` if they take at most a quarter of what the pages of `config` leave."""
    if mode != "auto" or not offload.n_layers:
        return mode == "on"
    plan = make_plan(graph, replace(config, gpu_expand=False), devices, offload, utilization)
    return all(
        4 * copies_bytes(stage.graph) <= room(stage.device, utilization) - stage.n_bytes(config.n_pages)
        for stage in plan.stages
        if stage.device is not None
    )


def buffer_bytes(graph: Graph, config: StageConfig) -> int:
    """An upper bound for activations and what the libraries take. Few of a step's rows go through the head."""
    rows = {"tokens": config.max_tokens, "outputs": min(config.max_tokens, max(_OUTPUTS, config.max_sequences))}
    last_read = {id(value): index for index, op in enumerate(graph.ops) for value in op.inputs}
    last_read.update((id(value), len(graph.ops)) for value in graph.results)
    alive: dict[int, int] = {}
    peak = 0
    for index, op in enumerate(graph.ops):
        alive |= {id(value): 4 * value.width * rows[value.rows] for value in op.outputs}
        peak = max(peak, sum(alive.values()))
        alive = {key: size for key, size in alive.items() if last_read.get(key, -1) > index}
    return _FIXED + 2 * peak


def _page_bytes(graph: Graph, config: StageConfig) -> int:
    return kv_page_bytes(graph, config.block_size, config.kv_dtype)


def _stage(graph: Graph, device: DeviceInfo | None, what: str, config: StageConfig) -> StagePlan:
    buffers = 0 if device is None else buffer_bytes(graph, config)
    copies = copies_bytes(graph) if device is not None and config.gpu_expand else 0
    return StagePlan(graph, device, what, weight_bytes(graph), _page_bytes(graph, config), buffers, copies)


def _name(start: int, end: int, n: int) -> str:
    """What units [start, end) are."""
    parts = ["embedding"] if start == 0 else []
    first, last = max(start, 1) - 1, min(end, n + 1) - 2
    if first < last:
        parts.append(f"blocks {first} to {last}")
    elif first == last:
        parts.append(f"block {first}")
    if end == n + 2:
        parts.append("head")
    return ", ".join(parts)
