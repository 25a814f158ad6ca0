"""Which ops are lowered together: rope and norms of heads with the attention they feed, a norm with the addition or the
sum of experts before it, gate and up with their activation.

Groups keep the order of the graph: a group stands where its last op stood.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import (
    Add,
    ApplyRope,
    Attention,
    CombineExperts,
    ExpertMatMul,
    GatedActivation,
    MatMul,
    Op,
    RMSNorm,
    StoreKV,
    Value,
)
from pyinfer.graph.rope import Rope


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """One layer's keys and values into their pages, and its attention. `q`, `k` are as the projections made them."""

    q: Value
    k: Value
    v: Value
    attention: Attention
    rope: Rope | None
    q_norm: RMSNorm | None  # each head by itself, before the rope; both or none
    k_norm: RMSNorm | None
    key_bias: bool  # the projection adds one, which makes scores large
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True, eq=False)
class NormGroup:
    """norm(add.a + add.b), where the sum is kept too; with `before`, one of both is first normalized by that."""

    before: RMSNorm | None
    x: Value  # what is normalized first, or one of both
    residual: Value
    add: Add
    norm: RMSNorm
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True, eq=False)
class CombineNormGroup:
    """norm(the sum of experts' results and a residual row), where the sum is kept too."""

    combine: CombineExperts
    norm: RMSNorm

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.combine, self.norm


@dataclass(frozen=True, slots=True, eq=False)
class GatedGroup:
    """The first half of a gated feed-forward layer: both products, which nothing else reads, and what becomes of them."""

    matmul: MatMul | ExpertMatMul
    gated: GatedActivation

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.matmul, self.gated


@dataclass(frozen=True, slots=True, eq=False)
class SingleOp:
    op: Op

    @property
    def ops(self) -> tuple[Op, ...]:
        return (self.op,)


Group = AttentionGroup | NormGroup | CombineNormGroup | GatedGroup | SingleOp


def group_ops(graph: Graph) -> list[Group]:
    """Every op in one group."""
    makers = {id(value): op for op in graph.ops for value in op.outputs}
    readers = graph.readers()
    found: list[Group] = [*_attention_groups(graph, makers, readers), *_norm_groups(graph, readers)]
    found += _combine_norm_groups(graph)
    found += _gated_groups(graph, makers, readers)
    groups = {id(group.ops[-1]): group for group in found}
    inside = {id(op) for group in groups.values() for op in group.ops[:-1]}
    return [groups.get(id(op), SingleOp(op)) for op in graph.ops if id(op) not in inside]


def _attention_groups(graph: Graph, makers: dict[int, Op], readers: dict[int, list[Op]]) -> list[AttentionGroup]:
    stores = {op.layer: op for op in graph.ops if isinstance(op, StoreKV)}
    groups = []
    for op in graph.ops:
        if not isinstance(op, Attention):
            continue
        store = stores[op.layer]
        q, q_rope, q_norm = _chain(op.q, makers, readers)
        k, k_rope, k_norm = _chain(store.k, makers, readers)
        rope = q_rope.rope if q_rope else None
        if rope is not (k_rope.rope if k_rope else None) or not _alike(q_norm, k_norm):
            continue
        chain = [part for part in (q_norm, k_norm, q_rope, k_rope, store, op) if part is not None]
        key_bias = _adds_bias(makers[id(k)], k)
        groups.append(AttentionGroup(q, k, store.v, op, rope, q_norm, k_norm, key_bias, tuple(chain)))
    return groups


def _chain(
    value: Value, makers: dict[int, Op], readers: dict[int, list[Op]]
) -> tuple[Value, ApplyRope | None, RMSNorm | None]:
    """Back from what attention reads to what the projection made: over a rope, and a norm before it."""
    rope, norm = makers[id(value)], None
    if not isinstance(rope, ApplyRope) or len(readers[id(value)]) > 1:
        return value, None, None
    norm = makers[id(rope.x)]
    if isinstance(norm, RMSNorm) and len(readers[id(rope.x)]) == 1 and norm.weight.size == rope.head_dim:
        return norm.x, rope, norm
    return rope.x, rope, None


def _adds_bias(maker: Op, value: Value) -> bool:
    return isinstance(maker, MatMul) and maker.biases[maker.outs.index(value)] is not None


def _alike(a: RMSNorm | None, b: RMSNorm | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.eps == b.eps


def _norm_groups(graph: Graph, readers: dict[int, list[Op]]) -> list[NormGroup]:
    """Additions right before a norm of whole rows."""
    groups = []
    for index, (add, norm) in enumerate(zip(graph.ops, graph.ops[1:], strict=False)):
        if not isinstance(add, Add) or not isinstance(norm, RMSNorm):
            continue
        if norm.x is not add.out or norm.weight.size != norm.x.width:
            continue
        before = graph.ops[index - 1] if index else None
        is_first = isinstance(before, RMSNorm) and before.weight.size == before.x.width and before.out.dtype == "f32"
        for x, residual in ((add.a, add.b), (add.b, add.a)):
            if is_first and isinstance(before, RMSNorm) and before.out is x and readers[id(x)] == [add]:
                groups.append(NormGroup(before, before.x, residual, add, norm, (before, add, norm)))
                break
        else:
            groups.append(NormGroup(None, add.a, add.b, add, norm, (add, norm)))
    return groups


def _combine_norm_groups(graph: Graph) -> list[CombineNormGroup]:
    return [
        CombineNormGroup(combine, norm)
        for combine, norm in zip(graph.ops, graph.ops[1:], strict=False)
        if isinstance(combine, CombineExperts) and combine.residual is not None and isinstance(norm, RMSNorm)
        if norm.x is combine.out and norm.weight.size == norm.x.width
    ]


def _gated_groups(graph: Graph, makers: dict[int, Op], readers: dict[int, list[Op]]) -> list[GatedGroup]:
    groups = []
    for op in graph.ops:
        if not isinstance(op, GatedActivation):
            continue
        maker = makers.get(id(op.gate))
        if not isinstance(maker, MatMul | ExpertMatMul) or maker is not makers.get(id(op.up)):
            continue
        if isinstance(maker, MatMul) and any(bias is not None for bias in maker.biases):
            continue
        if len(maker.outs) == 2 and op.gate is not op.up and readers[id(op.gate)] == readers[id(op.up)] == [op]:
            groups.append(GatedGroup(maker, op))
    return groups
