"""Cutting a graph at block boundaries, so that its parts can run on different devices.

A decoder passes one row of n_embd columns from block to block, the residual stream: where nothing else is alive a graph
can be cut, and the two parts compute what the whole did, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, Embed, ExpertMatMul, Hidden, MatMul, Op, Quantize, RMSNorm, StoreKV, Value
from pyinfer.quant.tensor import QuantTensor


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A place between two ops: `value` is all that the ops from `index` on need of those before."""

    index: int
    value: Value


def block_cuts(graph: Graph) -> list[Cut]:
    """Where each block begins, and last where the head does: n_blocks + 1 cuts. A block holds one `Attention`.

    The first cut leaves the embedding before it; the head is the final norm and the output matrix.
    """
    places = list(_cuts(graph))
    attentions = [i for i, op in enumerate(graph.ops) if isinstance(op, Attention)]
    cuts = []
    for first, last in zip([0, *attentions], [*attentions, len(graph.ops)], strict=True):
        between = [cut for cut in places if first < cut.index <= last]
        assert between, f"ops {first} to {last} hold no block boundary"
        cuts.append(between[-1])
    return cuts


def split_graph(graph: Graph, cuts: Sequence[Cut]) -> list[Graph]:
    """The parts before, between and after the cuts, in ascending order; each begins where the one before ended."""
    starts = [0, *(cut.index for cut in cuts)]
    ends = [*(cut.index for cut in cuts), len(graph.ops)]
    begins: list[Value | None] = [None, *(cut.value for cut in cuts)]
    results = [*(cut.value for cut in cuts), graph.logits]
    parts = []
    for start, end, value, result in zip(starts, ends, begins, results, strict=True):
        assert start < end, "an empty part"
        ops: list[Op] = [] if value is None else [Hidden(value)]
        parts.append(_part(graph, [*ops, *graph.ops[start:end]], result))
        parts[-1].check()
    return parts


def weights_of(graph: Graph) -> Iterable[QuantTensor]:
    """Every matrix that the ops read, each once; a tied output matrix is the embedding's table."""
    seen: dict[int, QuantTensor] = {}
    for op in graph.ops:
        read = (op.table,) if isinstance(op, Embed) else op.weights if isinstance(op, MatMul | ExpertMatMul) else ()
        for weight in read:
            seen.setdefault(id(weight.data), weight)
    return seen.values()


def expandable_weights(graph: Graph) -> Iterable[QuantTensor]:
    """Matrices that a GPU may keep in float16 beside their packed form: those that all rows of a step are multiplied with.

    An expert's are not among them: it sees a few rows of each step.
    """
    seen: dict[int, QuantTensor] = {}
    for op in graph.ops:
        if isinstance(op, MatMul) and op.outs[0].rows == "tokens":
            for weight in op.weights:
                if weight.codec.name not in ("F32", "F16"):
                    seen.setdefault(id(weight.data), weight)
    return seen.values()


def _part(graph: Graph, ops: Sequence[Op], result: Value) -> Graph:
    """These ops with the KV layers that they use, counted anew from 0; all groups stay, as the batch has their tables."""
    layers = sorted({op.layer for op in ops if isinstance(op, StoreKV | Attention)})
    number = {layer: i for i, layer in enumerate(layers)}
    renumbered = (replace(op, layer=number[op.layer]) if isinstance(op, StoreKV | Attention) else op for op in ops)
    groups = (
        replace(group, layers=tuple(number[layer] for layer in group.layers if layer in number))
        for group in graph.kv_groups
    )
    return replace(
        graph,
        ops=tuple(renumbered),
        logits=result,
        kv_layers=tuple(graph.kv_layers[layer] for layer in layers),
        kv_groups=tuple(groups),
    )


def _cuts(graph: Graph) -> Iterable[Cut]:
    """Every place where a single residual row is alive. The row after a norm is none: the norm belongs to what follows."""
    makers = {id(value): op for op in graph.ops for value in op.outputs}
    last_read = {id(value): index for index, op in enumerate(graph.ops) for value in op.inputs}
    last_read[id(graph.logits)] = len(graph.ops)
    alive: dict[int, Value] = {}
    for index, op in enumerate(graph.ops):
        if len(alive) == 1:
            (value,) = alive.values()
            is_residual = not isinstance(makers[id(value)], RMSNorm | Quantize)
            if value.dtype == "f32" and value.width == graph.n_embd and is_residual:
                yield Cut(index, value)
        for value in op.outputs:
            if last_read.get(id(value), -1) > index:
                alive[id(value)] = value
        for value in op.inputs:
            if last_read[id(value)] == index:
                alive.pop(id(value), None)
