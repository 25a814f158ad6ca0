"""Rewriting passes: pure functions Graph -> Graph that keep what a graph computes (up to the rounding of "a8").

`optimize` runs them all, in the order that lets each see its pattern.
"""

from __future__ import annotations

from dataclasses import replace

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Add, ApplyRope, Attention, GatedActivation, MatMul, Op, Quantize, RMSNorm, Value
from pyinfer.graph.rope import Rope
from pyinfer.quant.tensor import QuantTensor


def optimize(graph: Graph) -> Graph:
    """All passes: fewer, larger ops, with int8 activations before quantized weights."""
    for rewrite in (fuse_projections, fuse_residuals, quantize_activations):
        graph = rewrite(graph)
        graph.check()
    return graph


def for_context(graph: Graph, n_ctx: int) -> Graph:
    """The graph for sequences of up to `n_ctx` tokens. It changes models whose rotary embedding depends on that."""
    ropes: dict[int, Rope] = {}  # one object each, for backends keep one table each

    def chosen(rope: Rope) -> Rope:
        return ropes.setdefault(id(rope), rope.for_context(n_ctx))

    return replace(
        graph, ops=tuple(replace(op, rope=chosen(op.rope)) if isinstance(op, ApplyRope) else op for op in graph.ops)
    )


def is_quantized(weight: QuantTensor) -> bool:
    """Block types take int8 activations; F32, F16 and BF16 take float ones."""
    return weight.codec.block_size > 1


def fuse_projections(graph: Graph) -> Graph:
    """MatMuls of the same x (q/k/v; gate/up) become one with several outs, at the place of the first.

    Float and quantized weights stay apart, because they read x in different forms.
    """
    groups: dict[tuple[int, bool], list[MatMul]] = {}
    for op in graph.ops:
        if isinstance(op, MatMul) and op.residual is None:
            groups.setdefault((id(op.x), _takes_int8(op)), []).append(op)
    fused: dict[int, MatMul | None] = {}  # id of an old op -> what stands in its place
    for group in groups.values():
        if len(group) > 1:
            fused.update((id(op), None) for op in group)
            fused[id(group[0])] = MatMul(
                outs=tuple(out for op in group for out in op.outs),
                x=group[0].x,
                weights=tuple(weight for op in group for weight in op.weights),
                biases=tuple(bias for op in group for bias in op.biases),
            )
    ops = (fused.get(id(op), op) for op in graph.ops)
    return replace(graph, ops=tuple(op for op in ops if op is not None))


def fuse_residuals(graph: Graph) -> Graph:
    """Add(MatMul result that nothing else reads, other) becomes the MatMul's residual, at the place of the Add."""
    makers = {id(op.outs[0]): op for op in graph.ops if isinstance(op, MatMul) and len(op.outs) == 1}
    dropped: set[int] = set()
    ops: list[Op] = []
    for op in graph.ops:
        if isinstance(op, Add) and op.a is not op.b:
            for part, other in ((op.a, op.b), (op.b, op.a)):
                maker = makers.get(id(part))
                if maker is not None and maker.residual is None and graph.consumers(part) == [op]:
                    dropped.add(id(maker))
                    op = replace(maker, outs=(op.out,), residual=other)
                    break
        ops.append(op)
    return replace(graph, ops=tuple(op for op in ops if id(op) not in dropped))


def quantize_activations(graph: Graph) -> Graph:
    """Every MatMul with quantized weights reads an "a8" value.

    The op that makes x writes "a8" by itself where it can and nothing else reads x; otherwise one Quantize follows it.
    """
    int8_of: dict[int, Value] = {}  # id of x -> its "a8" form
    for op in graph.ops:
        if isinstance(op, MatMul) and _takes_int8(op) and op.x.dtype == "f32":
            int8_of.setdefault(id(op.x), Value(f"{op.x.name}.a8", op.x.width, op.x.rows, "a8"))
    ops: list[Op] = []
    for op in graph.ops:
        if isinstance(op, MatMul) and id(op.x) in int8_of and _takes_int8(op):
            op = replace(op, x=int8_of[id(op.x)])
        if (
            isinstance(op, RMSNorm | GatedActivation | Attention)
            and id(op.out) in int8_of
            and _only_int8_readers(graph, op.out)
        ):
            ops.append(replace(op, out=int8_of[id(op.out)]))
            continue
        ops.append(op)
        ops.extend(Quantize(int8_of[id(out)], out) for out in op.outputs if id(out) in int8_of)
    return replace(graph, ops=tuple(ops))


def _takes_int8(op: MatMul) -> bool:
    return all(is_quantized(weight) for weight in op.weights)


def _only_int8_readers(graph: Graph, value: Value) -> bool:
    readers = graph.consumers(value)
    return bool(readers) and all(
        isinstance(op, MatMul) and op.x is value and op.residual is not value and _takes_int8(op) for op in readers
    )
