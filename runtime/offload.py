"""Which parts of a model go to which device: `make_plan` counts the bytes, before anything is loaded.

The first blocks stay on the CPU and the last go to the GPUs, so that rows hop once. `-ngl N` moves N blocks, `all` the
embedding and the head too, `auto` as much as fits: the head first, which is worth a few blocks and whose rows are only
those whose logits are asked for. The experts of the first `n_cpu_experts` blocks stay on the CPU wherever their blocks are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import DeviceInfo, StageConfig
from pyinfer.graph.experts import ExpertRun, gather_experts
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import ExpertMatMul
from pyinfer.graph.passes import optimize
from pyinfer.graph.split import block_cuts, split_graph
from pyinfer.graph.tensor_split import shard_graph
from pyinfer.runtime.borrow_plan import BorrowPlan, borrow_plan
from pyinfer.runtime.model_pieces import block_names, divide, piece_name, spans_of
from pyinfer.runtime.stage_plan import (
    StagePlan,
    aligned_bytes,
    copies_bytes,
    room,
    stage_lines,
    stage_plan,
)

GPULayers = int | Literal["auto", "all"]
GPUExpand = Literal["auto", "on", "off"]
GPUSplit = Literal["layer", "tensor"]
GPU_SPLIT: tuple[GPUSplit, ...] = ("layer", "tensor")
GPU_EXPAND: tuple[GPUExpand, ...] = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class Offload:
    """What is on GPUs: the last `n_blocks` blocks, and maybe what is before the first and after the last."""

    n_blocks: int
    has_head: bool = False
    has_embedding: bool = False
    n_cpu_experts: int = 0  # the experts of the first so many blocks are on the CPU
    op_offload: bool = False  # steps of many rows have the CPU's blocks multiplied on the first GPU
    expert_offload: bool = False  # and their experts, and those of a GPU's blocks on that one

    @property
    def n_layers(self) -> int:
        """As llama.cpp counts: the head is a layer."""
        return self.n_blocks + self.has_head


@dataclass(frozen=True, slots=True, eq=False)
class OffloadPlan:
    """Stages in the order in which they first run."""

    offload: Offload
    stages: tuple[StagePlan, ...]
    utilization: float
    is_tensor: bool = False  # the stages are ranks of a tensor split, which work at the same time
    borrowed: BorrowPlan | None = None  # what a GPU computes for the CPU in some steps

    @property
    def parts(self) -> list[tuple[Graph, DeviceInfo | None]]:
        """The graph's parts in order of execution, each with its device."""
        parts = {
            number: (graph, stage.device)
            for stage in self.stages
            for number, graph in zip(stage.numbers, stage.graphs, strict=True)
        }
        return [parts[number] for number in range(len(parts))]

    @property
    def host_weight_bytes(self) -> int:
        """Of the CPU's matrices, and of the file's where a GPU reads them from host memory."""
        repacked = sum(stage.weight_bytes for stage in self.stages if stage.device is None)
        return repacked + (self.borrowed.host_bytes if self.borrowed else 0)

    @property
    def is_all(self) -> bool:
        """Nothing runs on the CPU, but maybe experts."""
        return self.offload.has_embedding

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
        lines = stage_lines(self.stages, n_pages, self.utilization)
        return [*lines, *(loan.line for loan in self.borrowed.loans)] if self.borrowed else lines


def wanted(
    layers: GPULayers,
    n_blocks: int,
    n_cpu_experts: int = 0,
    *,
    op_offload: bool = False,
    expert_offload: bool = False,
) -> Offload:
    """What `-ngl` asks for; more layers than there are blocks mean all, as in llama.cpp."""
    is_all = not isinstance(layers, int) or layers > n_blocks
    n = n_blocks if not isinstance(layers, int) else min(layers, n_blocks)
    return Offload(n, is_all, is_all, n_cpu_experts, op_offload, expert_offload)


def candidates(
    layers: GPULayers,
    n_blocks: int,
    n_cpu_experts: int = 0,
    *,
    op_offload: bool = False,
    expert_offload: bool = False,
) -> Iterator[Offload]:
    """What was asked for, then less and less, down to nothing."""
    first = wanted(layers, n_blocks, n_cpu_experts, op_offload=op_offload, expert_offload=expert_offload)
    most = n_blocks if first.has_head else first.n_blocks - 1
    sizes = [first, *(replace(first, n_blocks=n, has_embedding=False) for n in range(most, 0, -1))]
    less = [replace(offload, expert_offload=False) for offload in sizes]
    if layers == "auto":
        yield from sizes
        if expert_offload:
            yield from less
    else:  # so many layers were asked for
        for offload, without in zip(sizes, less, strict=True):
            yield offload
            if expert_offload:
                yield without
            if op_offload:
                yield replace(without, op_offload=False)
    if first.n_layers:
        yield Offload(0)


def make_tensor_plan(
    graph: Graph, config: StageConfig, devices: Sequence[DeviceInfo], offload: Offload, utilization: float
) -> OffloadPlan:
    """An equal part of every block on each GPU, of a graph that is not yet optimized; ConfigError if that is not possible."""
    shards = [optimize(shard) for shard in shard_graph(graph, len(devices))]
    what = f"1/{len(devices)} of every block and of the head"
    stages = (
        stage_plan([(number, shard)], device, what, config)
        for number, (shard, device) in enumerate(zip(shards, devices, strict=True))
    )
    return OffloadPlan(offload, tuple(stages), utilization, is_tensor=True)


def make_plan(
    graph: Graph, config: StageConfig, devices: Sequence[DeviceInfo], offload: Offload, utilization: float
) -> OffloadPlan:
    """Where everything goes for this offload, whether it fits or not; blocks are shared out over the GPUs."""
    n = len(graph.kv_layers)
    if not offload.n_layers:
        return OffloadPlan(offload, (stage_plan([(0, graph)], None, "all", config),), utilization)
    graph, runs = gather_experts(graph)
    cuts = block_cuts(graph)
    first = n - offload.n_blocks
    runs = [run for run in runs if first <= run.block < offload.n_cpu_experts]
    shares = divide(_costs(graph, config, cuts, runs)[first:], [room(device, utilization) for device in devices])
    ends = [first + sum(shares[: i + 1]) for i in range(len(shares))]
    # (first unit, last unit + 1, device): the embedding is unit 0, block i is unit i + 1, the head is the last
    starts = [0 if offload.has_embedding else first + 1, *(end + 1 for end in ends)]
    pieces: list[tuple[int, int, DeviceInfo | None]] = [(0, starts[0], None)]
    pieces += [(a, b, device) for a, b, device in zip(starts, starts[1:], devices, strict=False)]
    a, b, last = pieces.pop()
    pieces.append((a, b + 1, last) if offload.has_head else (a, b, last))
    pieces.append((pieces[-1][1], n + 2, None))
    pieces = [piece for piece in pieces if piece[0] < piece[1]]
    places = [0, *cuts, len(graph.ops)]
    spans = spans_of([(places[start], places[end]) for start, end, _ in pieces], runs)
    owners = [None if piece is None else pieces[piece][2] for _, piece in spans]
    parts = split_graph(graph, [start for start, _ in spans[1:]], [device and device.index for device in owners])
    numbered: dict[int | None, list[tuple[int, Graph]]] = {}
    for number, (part, (_, piece)) in enumerate(zip(parts, spans, strict=True)):
        numbered.setdefault(piece, []).append((number, part))
    away = sorted({run.block for run in runs})
    stages = [
        stage_plan(own, None, f"experts of {block_names(away)}", config)
        if piece is None
        else stage_plan(own, pieces[piece][2], piece_name(*pieces[piece][:2], n, away), config)
        for piece, own in numbered.items()
    ]
    away_parts = [number for number, (_, piece) in enumerate(spans) if piece is None]
    block_of = {number: run.block for number, run in zip(away_parts, runs, strict=True)}
    borrowed = _borrowed(parts, owners, block_of, first, stages, config, offload)
    if borrowed:
        stages = borrowed.with_buffers(stages)
    return OffloadPlan(offload, tuple(stages), utilization, borrowed=borrowed)


def _borrowed(
    parts: Sequence[Graph],
    owners: Sequence[DeviceInfo | None],
    block_of: Mapping[int, int],
    first: int,
    stages: Sequence[StagePlan],
    config: StageConfig,
    offload: Offload,
) -> BorrowPlan | None:
    """What GPUs compute for the CPU: `first` blocks that are there, and the experts of blocks, in parts of those numbers."""
    lenders: dict[int, DeviceInfo] = {}  # by the number of the part
    names: dict[int, list[str]] = {}  # by the number of the GPU
    if offload.op_offload and first > 0:
        lenders[0] = next(device for device in owners if device is not None)
        what = "products and experts" if offload.expert_offload else "products"
        names[lenders[0].index] = [f"{what} of {block_names(range(first))}"]
    blocks: dict[int, list[int]] = {}
    for number, block in block_of.items():
        device = owners[number - 1]
        assert device is not None
        # of the last block only rows whose logits are asked for get there
        if offload.expert_offload and parts[number].logits.rows == "tokens":
            lenders[number] = device
            blocks.setdefault(device.index, []).append(block)
    for index, own in blocks.items():
        names.setdefault(index, []).append(f"experts of {block_names(own)}")
    if not lenders:
        return None
    return borrow_plan(parts, owners, lenders, names, stages, config, experts=offload.expert_offload)


def _costs(graph: Graph, config: StageConfig, cuts: Sequence[int], runs: Sequence[ExpertRun]) -> list[int]:
    """Bytes of each block and its pages, without the experts of `runs`."""
    costs = [
        stage_plan([(0, block)], None, "", config).n_bytes(config.n_pages) for block in split_graph(graph, cuts)[1:-1]
    ]
    for run in runs:
        experts = (op for op in graph.ops[run.start : run.end] if isinstance(op, ExpertMatMul))
        costs[run.block] -= aligned_bytes(weight for op in experts for weight in op.weights)
    return costs


def check_layers(layers: object) -> None:
    """ConfigError unless this is a number of layers, "auto" or "all"."""
    is_number = isinstance(layers, int) and not isinstance(layers, bool) and layers >= 0
    if not is_number and layers not in ("auto", "all"):
        raise ConfigError(f"n_gpu_layers is {layers!r}; give a number of layers, 'auto' or 'all'", param="n_gpu_layers")


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
        4 * sum(map(copies_bytes, stage.graphs)) <= room(stage.device, utilization) - stage.n_bytes(config.n_pages)
        for stage in plan.stages
        if stage.device is not None
    )
