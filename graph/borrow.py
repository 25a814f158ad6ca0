"""Blocks of one device whose products another computes, where a step has rows enough to be worth the way there."""

from __future__ import annotations

from itertools import groupby

from pyinfer.graph.experts import gather_experts
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, Embed, MatMul
from pyinfer.graph.split import split_graph


def borrow_products(graph: Graph) -> tuple[list[Graph], list[bool]]:
    """The graph's parts in order, and which of them may run elsewhere: all but the embedding, what is between the last
    product before an attention and its end (rope, keys and values, norms of heads), and the products with experts.

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
    for run in runs:
        stays[run.start : run.end] = [True] * (run.end - run.start)
    flags, cuts, start = [], [], 0
    for flag, ops in groupby(stays):
        flags.append(not flag)
        cuts.append(start)
        start += len(list(ops))
    return split_graph(graph, cuts[1:], flags), flags
