"""What a GPU computes for the CPU in steps of many rows, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.graph.backend import DeviceInfo, StageConfig
from pyinfer.graph.borrow import borrow_products
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Hidden, MatMul
from pyinfer.graph.split import block_cuts, split_graph, weights_of
from pyinfer.runtime.sizes import format_binary
from pyinfer.runtime.stage_plan import StagePlan, aligned_bytes, buffer_bytes, weight_bytes

_SLOTS = 2  # parts whose matrices are on their way to the GPU


@dataclass(frozen=True, slots=True, eq=False)
class BorrowPlan:
    """The CPU's first part of the model cut anew: what goes to a GPU for the length of a step, and what stays."""

    parts: tuple[Graph, ...]  # in order of execution
    goes: tuple[bool, ...]  # which of them go
    device: DeviceInfo
    what: str  # "blocks 0 to 15"
    buffer_bytes: int  # of the GPU's own parts too, which share them
    host_bytes: int  # of matrices that are read where the file is mapped

    @property
    def line(self) -> str:
        weights = format_binary(self.host_bytes)
        return f"GPU {self.device.index}, in steps of many tokens: products of {self.what}; weights {weights}, from host memory"


def host_bytes(graph: Graph) -> list[int]:
    """What each block takes on a CPU whose products a GPU computes: repacked, and what is read from the file, pinned."""
    blocks = split_graph(graph, block_cuts(graph))[1:-1]
    products = [[w for op in block.ops if isinstance(op, MatMul) for w in op.weights] for block in blocks]
    return [weight_bytes(block) + aligned_bytes(own) for block, own in zip(blocks, products, strict=True)]


def borrow_plan(part: Graph, lender: StagePlan, what: str, config: StageConfig) -> BorrowPlan:
    """Of the part that the CPU begins with."""
    assert lender.device is not None
    parts, goes = borrow_products(part)
    away = [part for part, flag in zip(parts, goes, strict=True) if flag]
    raw = [sum(weight.data.nbytes for weight in weights_of(part)) for part in away]
    arrivals = [[op.out for op in part.ops if isinstance(op, Hidden)] for part in away]
    passed = max(sum(v.width for v in (*part.results, *own)) for part, own in zip(away, arrivals, strict=True))
    activations = max(lender.buffer_bytes, *(buffer_bytes(part, config) for part in away))
    matrices = _SLOTS * max(raw) + max(map(weight_bytes, away))
    needed = activations + matrices + 4 * config.max_tokens * passed
    return BorrowPlan(tuple(parts), tuple(goes), lender.device, what, needed, sum(raw))
