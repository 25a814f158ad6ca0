"""Cutting a graph between any two ops, so that its parts can run on different devices and compute what the whole did, bit by bit.

What a part makes and a later one reads is passed on as float32 or int32 rows: a value rounded for a matmul ("a8", "bf16")
crosses as what it is made from, and each part that reads it rounds it again. Between the blocks of a decoder only one value
is alive, the residual row of n_embd columns: `block_cuts` are those places.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, Embed, ExpertMatMul, Hidden, MatMul, Op, Quantize, RMSNorm, StoreKV, Value
from pyinfer.quant.tensor import QuantTensor

_ROUNDED = ("a8", "bf16")


def block_cuts(graph: Graph) -> list[int]:
    """The op at which each block begins, and last that of the head: n_blocks + 1 places. A block holds one `Attention`.

    The first leaves the embedding before it; the head is the final norm and the output matrix.
    """
    places = list(_single_rows(graph))
    attentions = [i for i, op in enumerate(graph.ops) if isinstance(op, Attention)]
    cuts = []
    for first, last in zip([0, *attentions], [*attentions, len(graph.ops)], strict=True):
        between = [place for place in places if first < place <= last]
        assert between, f"ops {first} to {last} hold no block boundary"
        cuts.append(between[-1])
    return cuts


def split_graph(graph: Graph, cuts: Sequence[int], owners: Sequence[Hashable] | None = None) -> list[Graph]:
    """The parts before, between and after the ops of these numbers, which ascend.

    A part begins with a `Hidden` for each value of earlier parts that it reads, and ends with all that later ones do
    (`Graph.results`); the values are the same objects in both (`sources`). `StoreKV` and `Attention` of a layer must stay
    together, and a part must hold more than a `Quantize`. Parts of the same owner share pages, so each has the KV layers of
    all of them, counted anew from 0; without `owners` a part has its own. A part may be split again: what it reads of others
    its parts read of them, too.
    """
    starts, ends = [0, *cuts], [*cuts, len(graph.ops)]
    assert all(start < end for start, end in zip(starts, ends, strict=True)), "an empty part"
    inside = [
        [op for op in graph.ops[start:end] if not isinstance(op, Hidden)]
        for start, end in zip(starts, ends, strict=True)
    ]
    parts = _unrounded(inside)
    made_in = {id(value): number for number, ops in enumerate(parts) for op in ops for value in op.outputs}
    reads = [_from_before(ops, made_in, number) for number, ops in enumerate(parts)]
    wanted = {id(value) for values in (*reads, graph.results) for value in values}
    owners = owners or range(len(parts))
    layers = {owner: _layers(parts, [i for i, each in enumerate(owners) if each == owner]) for owner in owners}
    graphs = []
    for number, (ops, values) in enumerate(zip(parts, reads, strict=True)):
        results = [value for op in ops for value in op.outputs if id(value) in wanted]
        assert results, f"nothing reads part {number}"
        graphs.append(_part(graph, [*map(Hidden, values), *ops], results, layers[owners[number]]))
        graphs[-1].check()
    return graphs


def sources(parts: Sequence[Graph]) -> list[list[tuple[int, int]]]:
    """For each part, in the order of its `Hidden` ops: the part that makes the value, and which of its results that is."""
    made = {id(value): (number, i) for number, part in enumerate(parts) for i, value in enumerate(part.results)}
    return [[made[id(op.out)] for op in part.ops if isinstance(op, Hidden)] for part in parts]


def last_readers(parts: Sequence[Graph], own: Sequence[int]) -> list[int]:
    """For each of the parts of the numbers `own`, which share memory: which of them, counted from 0, has begun last when
    the results of that part are last read (`graph.backend.PartsBackend`)."""
    last = dict[int, int]()
    for reader, read in enumerate(sources(parts)):
        last.update((number, reader) for number, _ in read)
    return [sum(begun <= last.get(number, number) for begun in own) - 1 for number in own]


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


def _unrounded(parts: list[list[Op]]) -> list[list[Op]]:
    """The same with a `Quantize` in every part that reads a rounded value of another: what crosses is not rounded."""
    made = {id(value): (number, op) for number, ops in enumerate(parts) for op in ops for value in op.outputs}
    readers: dict[int, set[int]] = {}
    for number, ops in enumerate(parts):
        for value in (value for op in ops for value in op.inputs if value.dtype in _ROUNDED):
            readers.setdefault(id(value), set()).add(number)
    exact: dict[int, Value] = {}  # id of a rounded value that crosses -> the value before rounding
    for key, numbers in readers.items():
        number, op = made[key]
        if numbers != {number}:
            (out,) = op.outputs
            exact[key] = op.x if isinstance(op, Quantize) else Value(f"{out.name}.exact", out.width, out.rows)
    rewritten = []
    for ops in parts:
        new: list[Op] = []
        held: set[int] = set()  # rounded values that this part has
        for op in ops:
            for value in op.inputs:
                if id(value) in exact and id(value) not in held:
                    held.add(id(value))
                    new.append(Quantize(value, exact[id(value)]))
            if len(op.outputs) == 1 and id(op.outputs[0]) in exact:
                if not isinstance(op, Quantize):
                    new.append(replace(op, out=exact[id(op.outputs[0])]))  # type: ignore[call-arg]
                continue
            new.append(op)
        rewritten.append(new)
    return rewritten


def _from_before(ops: Sequence[Op], made_in: dict[int, int], number: int) -> list[Value]:
    """What these ops read of the parts before theirs, in the order of first reads."""
    found = {id(value): value for op in ops for value in op.inputs if made_in.get(id(value), -1) < number}
    return list(found.values())


def _layers(parts: Sequence[Sequence[Op]], own: Sequence[int]) -> list[int]:
    """The KV layers of these parts."""
    found: set[int] = set()
    for number in own:
        stored, read = ({op.layer for op in parts[number] if isinstance(op, kind)} for kind in (StoreKV, Attention))
        assert stored == read, "keys and values are stored in one part and read in another"
        found |= stored
    return sorted(found)


def _part(graph: Graph, ops: Sequence[Op], results: Sequence[Value], layers: Sequence[int]) -> Graph:
    """These ops with these KV layers of the whole; all groups stay, as the batch has their tables."""
    number = {layer: i for i, layer in enumerate(layers)}
    renumbered = (replace(op, layer=number[op.layer]) if isinstance(op, StoreKV | Attention) else op for op in ops)
    groups = (
        replace(group, layers=tuple(number[layer] for layer in group.layers if layer in number))
        for group in graph.kv_groups
    )
    return replace(
        graph,
        ops=tuple(renumbered),
        logits=results[0],
        passed=tuple(results[1:]),
        kv_layers=tuple(graph.kv_layers[layer] for layer in layers),
        kv_groups=tuple(groups),
    )


def _single_rows(graph: Graph) -> Iterator[int]:
    """Every place where one residual row is all that is alive. After a norm is none: the norm belongs to what follows."""
    makers = {id(value): op for op in graph.ops for value in op.outputs}
    last_read = {id(value): index for index, op in enumerate(graph.ops) for value in op.inputs}
    last_read[id(graph.logits)] = len(graph.ops)
    alive: dict[int, Value] = {}
    for index, op in enumerate(graph.ops):
        if len(alive) == 1:
            (value,) = alive.values()
            is_residual = not isinstance(makers[id(value)], RMSNorm | Quantize)
            if value.dtype == "f32" and value.width == graph.n_embd and is_residual:
                yield index
        for value in op.outputs:
            if last_read.get(id(value), -1) > index:
                alive[id(value)] = value
        for value in op.inputs:
            if last_read[id(value)] == index:
                alive.pop(id(value), None)
