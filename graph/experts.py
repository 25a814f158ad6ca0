"""Where a graph's experts are: the ops that may run on another device than the rest of their block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, CombineExperts, ExpertMatMul, Op


@dataclass(frozen=True, slots=True)
class ExpertRun:
    """Ops [start, end) of a graph: the products with a block's experts, up to the sum of what they make."""

    block: int
    start: int
    end: int


def gather_experts(graph: Graph) -> tuple[Graph, list[ExpertRun]]:
    """The same graph, in which nothing stands between the products with a block's experts and their sum; and where these are.

    The router and a shared expert are not among them.
    """
    ops: list[Op] = []
    runs: list[ExpertRun] = []
    waiting: list[Op] = []  # for the sum that ends the run; nothing but these read what they make
    made: set[int] = set()  # values that experts made, or what was made of those
    for op in graph.ops:
        if not isinstance(op, ExpertMatMul) and not any(id(value) in made for value in op.inputs):
            ops.append(op)
            continue
        waiting.append(op)
        if isinstance(op, CombineExperts):
            block = sum(isinstance(other, Attention) for other in ops) - 1
            runs.append(ExpertRun(block, len(ops), len(ops) + len(waiting)))
            ops += waiting
            waiting = []
        else:
            made.update(map(id, op.outputs))
    assert not waiting, "what experts make is not summed up"
    return replace(graph, ops=tuple(ops)), runs
