"""Blocks of one device whose products another computes, where a step has rows enough to be worth the way there."""

from __future__ import annotations

from pyinfer.graph.experts import gather_experts
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, Embed, ExpertMatMul, MatMul
from pyinfer.graph.split import split_graph


def borrow_products(graph: Graph, *, experts: bool = False) -> tuple[list[Graph], list[bool]]:
    """The graph's parts in order, and which of them may run elsewhere: all but the embedding, what is between the last
    product before an attention and its end (rope, keys and values, norms of heads), and the products with experts.

    With `experts` these go, too. A part then begins with each of them, so that no part has all matrices of a block.
    The others, and the graph itself, number KV layers alike, so that they can share its pages.
    """
    graph, runs = gather_experts(graph)
    stays = [isinstance(op, Embed) for op in graph.ops]
    product = -1
    for index, op in enumerate(graph.ops):
        if isinstance(op, MatMul):
            product = index
        if isinstance(op, Attention):
            stays[product + 1 : index + 1] = [True] * (index - product)
    for run in () if experts else runs:
        stays[run.start : run.end] = [True] * (run.end - run.start)
    starts = set(expert_starts(graph)) if experts else set()
    cuts = [i for i in range(1, len(stays)) if stays[i] != stays[i - 1] or i in starts]
    flags = [not stays[i] for i in (0, *cuts)]
    return split_graph(graph, cuts, flags), flags


def expert_parts(run: Graph) -> list[Graph]:
    """A part that is the products with a block's experts, in parts that begin with each of them."""
    cuts = expert_starts(run)[1:]
    return split_graph(run, cuts, [True] * (len(cuts) + 1))


def expert_starts(graph: Graph) -> list[int]:
    """The products with experts among the ops."""
    return [i for i, op in enumerate(graph.ops) if isinstance(op, ExpertMatMul)]
