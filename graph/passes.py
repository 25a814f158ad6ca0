"""Rewriting passes: pure functions Graph -> Graph that keep what a graph computes (up to the rounding of "a8").

`optimize` runs them all, in the order that lets each see its pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import (
    Add,
    ApplyRope,
    Attention,
    CombineExperts,
    Dtype,
    ExpertMatMul,
    GatedActivation,
    MatMul,
    Op,
    Quantize,
    RMSNorm,
    Value,
)
from pyinfer.graph.rope import Rope
from pyinfer.quant.tensor import QuantTensor

AnyMatMul = MatMul | ExpertMatMul


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


def is_bfloat(weight: QuantTensor) -> bool:
    """BF16 in rows of whole 32 columns."""
    return weight.codec.name == "BF16" and weight.shape[-1] % 32 == 0


def fuse_projections(graph: Graph) -> Graph:
    """MatMuls of the same x (q/k/v; gate/up), and those of the same experts, become one with several outs.

    They stand at the place of the first. Quantized, BF16 and other float weights stay apart, because they may read x in
    different forms.
    """
    groups: dict[tuple[tuple[int, ...], bool, bool], list[AnyMatMul]] = {}
    for op in graph.ops:
        if isinstance(op, AnyMatMul) and getattr(op, "residual", None) is None:
            key = (tuple(map(id, op.inputs)), _all(op, is_quantized), _all(op, is_bfloat))
            groups.setdefault(key, []).append(op)
    fused: dict[int, Op | None] = {}  # id of an old op -> what stands in its place
    for group in groups.values():
        if len(group) > 1:
            fused.update((id(op), None) for op in group)
            parts: dict[str, Any] = {
                "outs": tuple(out for op in group for out in op.outs),
                "weights": tuple(weight for op in group for weight in op.weights),
            }
            if isinstance(group[0], MatMul):
                parts["biases"] = tuple(bias for op in group if isinstance(op, MatMul) for bias in op.biases)
            fused[id(group[0])] = replace(group[0], **parts)
    ops = (fused.get(id(op), op) for op in graph.ops)
    return replace(graph, ops=tuple(op for op in ops if op is not None))


def fuse_residuals(graph: Graph) -> Graph:
    """Add(result that nothing else reads, other) becomes the residual of its MatMul or CombineExperts, at the Add's place."""
    makers: dict[int, MatMul | CombineExperts] = {
        id(op.outputs[0]): op
        for op in graph.ops
        if isinstance(op, CombineExperts) or (isinstance(op, MatMul) and len(op.outs) == 1)
    }
    readers = graph.readers()
    dropped: set[int] = set()
    ops: list[Op] = []
    for op in graph.ops:
        if isinstance(op, Add) and op.a is not op.b:
            for part, other in ((op.a, op.b), (op.b, op.a)):
                maker = makers.get(id(part))
                if maker is not None and maker.residual is None and readers[id(part)] == [op]:
                    dropped.add(id(maker))
                    if isinstance(maker, MatMul):
                        op = replace(maker, outs=(op.out,), residual=other)
                    else:
                        op = replace(maker, out=op.out, residual=other)
                    break
        ops.append(op)
    return replace(graph, ops=tuple(op for op in ops if id(op) not in dropped))


def quantize_activations(graph: Graph) -> Graph:
    """Every matmul with quantized weights reads an "a8" value."""
    return _round_activations(graph, "a8", is_quantized)


def narrow_activations(graph: Graph) -> Graph:
    """Every matmul with BF16 weights reads a "bf16" value: for devices that multiply those faster than float32."""
    return _round_activations(graph, "bf16", is_bfloat)


def _round_activations(graph: Graph, dtype: Dtype, takes: Callable[[QuantTensor], bool]) -> Graph:
    """Every matmul with weights for which `takes` holds reads a value of `dtype`.

    The op that makes x writes `dtype` by itself where it can and nothing else reads x; otherwise one Quantize follows it.
    """
    rounded: dict[int, Value] = {}  # id of x -> its rounded form
    for op in graph.ops:
        if isinstance(op, AnyMatMul) and _all(op, takes) and op.x.dtype == "f32":
            rounded.setdefault(id(op.x), Value(f"{op.x.name}.{dtype}", op.x.width, op.x.rows, dtype))
    if not rounded:
        return graph
    readers = graph.readers()
    ops: list[Op] = []
    for op in graph.ops:
        if isinstance(op, AnyMatMul) and id(op.x) in rounded and _all(op, takes):
            op = replace(op, x=rounded[id(op.x)])
        if (
            isinstance(op, RMSNorm | GatedActivation | Attention)
            and id(op.out) in rounded
            and _only_rounded(readers[id(op.out)], op.out, takes)
        ):
            ops.append(replace(op, out=rounded[id(op.out)]))
            continue
        ops.append(op)
        ops.extend(Quantize(rounded[id(out)], out) for out in op.outputs if id(out) in rounded)
    return replace(graph, ops=tuple(ops))


def _all(op: AnyMatMul, holds: Callable[[QuantTensor], bool]) -> bool:
    return all(holds(weight) for weight in op.weights)


def _only_rounded(readers: list[Op], value: Value, takes: Callable[[QuantTensor], bool]) -> bool:
    return bool(readers) and all(
        isinstance(op, AnyMatMul) and op.inputs.count(value) == 1 and op.x is value and _all(op, takes)
        for op in readers
    )
