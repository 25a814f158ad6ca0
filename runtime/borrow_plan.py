"""What GPUs compute for the CPU in steps of many rows, and what that takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pyinfer.graph.backend import DeviceInfo, StageConfig
from pyinfer.graph.borrow import borrow_products, expert_parts
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import ExpertMatMul, Hidden, MatMul
from pyinfer.graph.split import block_cuts, sources, split_graph, weights_of
from pyinfer.runtime.sizes import format_binary
from pyinfer.runtime.stage_plan import StagePlan, aligned_bytes, buffer_bytes, weight_bytes

_SLOTS = 2  # parts whose matrices are on their way to the GPU
# An expert sees few of a step's rows, and its matrices take as long to bring as any: a quarter of the rows that are asked of
# other matrices, on average. Eight rows of 4.5-bit weights that come at 25 GB/s are 0.7 * 10^12 operations a second.
_LESS_ROWS = 4


@dataclass(frozen=True, slots=True)
class Loan:
    """What one GPU does."""

    device: DeviceInfo
    what: str  # "products of blocks 0 to 15"
    buffer_bytes: int  # of the GPU's own parts too, which share them
    host_bytes: int  # of matrices that are read where the file is mapped

    @property
    def line(self) -> str:
        weights = format_binary(self.host_bytes)
        return f"GPU {self.device.index}, in steps of many tokens: {self.what}; weights {weights}, from host memory"


@dataclass(frozen=True, slots=True, eq=False)
class BorrowPlan:
    """The whole model in the parts that steps of many rows run."""

    parts: tuple[Graph, ...]  # in order of execution
    devices: tuple[DeviceInfo | None, ...]  # of each; None: the CPU
    same: tuple[int | None, ...]  # which part of all other steps it is, and shares with them; None: a stage of its own
    loans: tuple[Loan, ...]

    @property
    def host_bytes(self) -> int:
        return sum(loan.host_bytes for loan in self.loans)

    def least_tokens(self, min_batch: int) -> int:
        """Of a step that runs these parts, where `min_batch` is how many a product is worth the way for."""
        lent = (
            part for part, n, device in zip(self.parts, self.same, self.devices, strict=True) if n is None and device
        )
        return least_tokens(lent, min_batch)

    def with_buffers(self, stages: Sequence[StagePlan]) -> list[StagePlan]:
        """The stages, and what the loans take beside them."""
        needed = {loan.device.index: loan.buffer_bytes for loan in self.loans}
        found = []
        for stage in stages:
            more = None if stage.device is None else needed.pop(stage.device.index, None)
            found.append(stage if more is None else replace(stage, buffer_bytes=more))
        return found


@dataclass(frozen=True, slots=True)
class HostBytes:
    """What a block takes in host memory."""

    weights: int  # repacked, without the experts
    products: int  # of those what is multiplied: as much again where a GPU reads it from the file, pinned
    experts: int  # repacked, or as in the file


def host_bytes(graph: Graph) -> list[HostBytes]:
    """Of each block."""
    found = []
    for block in split_graph(graph, block_cuts(graph))[1:-1]:
        products = [w for op in block.ops if isinstance(op, MatMul) for w in op.weights]
        experts = aligned_bytes(w for op in block.ops if isinstance(op, ExpertMatMul) for w in op.weights)
        found.append(HostBytes(weight_bytes(block) - experts, aligned_bytes(products), experts))
    return found


def least_tokens(graphs: Iterable[Graph], min_batch: int) -> int:
    """Tokens of a step from which on a GPU computes these parts: more than `min_batch` where many experts share them."""
    shares = [
        op.weights[0].shape[0] / op.n_used for graph in graphs for op in graph.ops if isinstance(op, ExpertMatMul)
    ]
    return max([min_batch, *(-int(-min_batch * share // _LESS_ROWS) for share in shares)])


def borrow_plan(
    parts: Sequence[Graph],
    devices: Sequence[DeviceInfo | None],
    lenders: Mapping[int, DeviceInfo],
    names: Mapping[int, Sequence[str]],
    stages: Sequence[StagePlan],
    config: StageConfig,
    *,
    experts: bool,
) -> BorrowPlan:
    """Of these parts and their devices, where `lenders` compute for those of some numbers: what the CPU begins with, whose
    experts go with `experts` only, or the experts of a block. `names[i]` is what GPU i computes."""
    many: list[Graph] = []
    places: list[DeviceInfo | None] = []
    same: list[int | None] = []
    away: dict[int, list[Graph]] = {}  # device -> parts whose matrices come
    for number, (part, device) in enumerate(zip(parts, devices, strict=True)):
        if number not in lenders:
            many.append(part)
            places.append(device)
            same.append(number)
            continue
        lender = lenders[number]
        if number:
            pieces = expert_parts(part)
            goes = [True] * len(pieces)
        else:
            pieces, goes = borrow_products(part, experts=experts)
        many += pieces
        places += [lender if flag else None for flag in goes]
        same += [None] * len(pieces)
        away.setdefault(lender.index, []).extend(piece for piece, flag in zip(pieces, goes, strict=True) if flag)
    for reader, read in enumerate(sources(many)):  # rows from one part of a GPU to a lent one of it stay there
        if same[reader] is None and places[reader] is not None:
            for maker in {maker for maker, _ in read if places[maker] is not None}:
                same[maker] = None
    by_index = {lender.index: lender for lender in lenders.values()}
    loans = [_loan(device, away[i], names[i], stages, config) for i, device in by_index.items()]
    return BorrowPlan(tuple(many), tuple(places), tuple(same), tuple(loans))


def _loan(
    device: DeviceInfo, away: Sequence[Graph], names: Sequence[str], stages: Sequence[StagePlan], config: StageConfig
) -> Loan:
    own = next(
        stage.buffer_bytes for stage in stages if stage.device is not None and stage.device.index == device.index
    )
    raw = [sum(weight.data.nbytes for weight in weights_of(part)) for part in away]
    arrivals = [[op.out for op in part.ops if isinstance(op, Hidden)] for part in away]
    passed = max(sum(v.width for v in (*part.results, *own)) for part, own in zip(away, arrivals, strict=True))
    activations = max(own, *(buffer_bytes(part, config) for part in away))
    matrices = _SLOTS * max(raw) + max(map(weight_bytes, away))
    needed = activations + matrices + 2 * 4 * config.max_tokens * passed  # and what waits for the part after
    return Loan(device, ", ".join(names), needed, sum(raw))
