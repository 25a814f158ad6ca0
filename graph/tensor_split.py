"""Tensor parallelism: one graph for each of n devices, every block shared by all of them (Megatron-LM, arXiv:1909.08053).

A device holds its share of the heads (rows of q, k and v, columns of the output projection) and of the feed-forward's width
(rows of gate and up, columns of down). Both halves of a block end with a partial sum over all of n_embd, which an `AllReduce`
makes whole on every device; norms and the residual row are on each. The head's rows are shared out too; its columns of the
logits are brought together on every device, so that each can draw tokens. Of a mixture of experts, each device has its share
of every expert's width and chooses all experts itself; what they make is added up before it is made whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pyinfer.errors import ConfigError
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import (
    Add,
    AllReduce,
    ApplyRope,
    Attention,
    CombineExperts,
    Embed,
    ExpertMatMul,
    GatedActivation,
    GatherColumns,
    MatMul,
    Op,
    RMSNorm,
    RouteExperts,
    SelectRows,
    StoreKV,
    Value,
)
from pyinfer.quant.tensor import QuantTensor


def shard_graph(graph: Graph, n: int) -> list[Graph]:
    """The graphs of ranks 0..n-1, of a graph that is not yet optimized. ConfigError if something cannot be shared out evenly."""
    return [_Shard(graph, n, rank).graph() for rank in range(n)]


def columns_of(tensor: QuantTensor, first: int, stop: int) -> QuantTensor:
    """The matrix, or that of each expert, of columns first..stop-1, whole blocks of them, on bytes of its own."""
    codec = tensor.codec
    assert first % codec.block_size == stop % codec.block_size == 0
    data = np.ascontiguousarray(tensor.data[:, codec.row_bytes(first) : codec.row_bytes(stop)])
    return replace(tensor, shape=(*tensor.shape[:-1], stop - first), data=data, mapping=None)


def expert_rows_of(tensor: QuantTensor, first: int, stop: int) -> QuantTensor:
    """Of each expert's matrix, rows first..stop-1, on bytes of their own."""
    n_experts, rows, columns = tensor.shape
    data = tensor.data.reshape(n_experts, rows, -1)[:, first:stop]
    data = np.ascontiguousarray(data).reshape(n_experts * (stop - first), -1)
    return replace(tensor, shape=(n_experts, stop - first, columns), data=data, mapping=None)


class _Shard:
    """Goes through the ops once; knows of each value whether this rank has all of it or a part of its columns."""

    def __init__(self, graph: Graph, n: int, rank: int) -> None:
        self._graph, self._n, self._rank = graph, n, rank
        self._values: dict[int, Value] = {}  # of the whole graph -> of this one
        self._partial: set[int] = set()  # those of the whole graph of which each rank has a summand
        self._routers = {id(op.logits) for op in graph.ops if isinstance(op, RouteExperts)}
        self._ops: list[Op] = []
        self._rules: dict[type[Op], Callable[[Any], None]] = {
            Embed: self._whole,
            RMSNorm: self._norm,
            MatMul: self._matmul,
            ApplyRope: self._like_input,
            StoreKV: self._store,
            Attention: self._attention,
            GatedActivation: self._like_input,
            Add: self._like_input,
            SelectRows: self._like_input,
            RouteExperts: self._route,
            ExpertMatMul: self._expert_matmul,
            CombineExperts: self._combine,
        }

    def graph(self) -> Graph:
        for op in self._graph.ops:
            self._rules[type(op)](op)
        layers = tuple(
            replace(layer, n_kv_heads=self._share(layer.n_kv_heads, "key heads")) for layer in self._graph.kv_layers
        )
        logits = self._values[id(self._graph.logits)]
        if self._is_split(self._graph.logits):
            whole = self._graph.logits
            self._ops.append(GatherColumns(Value(whole.name, whole.width, whole.rows), logits, self._rank))
            logits = self._ops[-1].outputs[0]
        graph = replace(self._graph, ops=tuple(self._ops), logits=logits, kv_layers=layers)
        graph.check()
        return graph

    def _share(self, size: int, what: str, unit: int = 1) -> int:
        """A rank's part of `size`, which must be whole units."""
        if size % (self._n * unit):
            blocks = f" in blocks of {unit}" if unit > 1 else ""
            raise ConfigError(f"{size} {what}{blocks} cannot be shared out over {self._n} GPUs; use a layer split")
        return size // self._n

    def _range(self, size: int, what: str, unit: int = 1) -> tuple[int, int]:
        part = self._share(size, what, unit)
        return self._rank * part, (self._rank + 1) * part

    def _is_split(self, value: Value) -> bool:
        return self._values[id(value)].width < value.width

    def _new(self, value: Value, *, is_split: bool) -> Value:
        width = self._share(value.width, f"columns of {value.name}") if is_split else value.width
        self._values[id(value)] = Value(value.name, width, value.rows, value.dtype)
        return self._values[id(value)]

    # ---- one rule an op
    def _whole(self, op: Embed) -> None:
        self._ops.append(replace(op, out=self._new(op.out, is_split=False)))

    def _norm(self, op: RMSNorm) -> None:
        assert op.weight.size < op.x.width or not self._is_split(op.x), "a norm over columns of several ranks"
        self._like_input(op)

    def _like_input(self, op: Any) -> None:
        """Works on each column or head by itself: all inputs are whole, or all are split."""
        kinds = {self._is_split(value) for value in op.inputs}
        assert len(kinds) == 1, f"{type(op).__name__} of a whole value and a part"
        fields = {name: self._values[id(getattr(op, name))] for name in op.READS}
        self._ops.append(replace(op, out=self._new(op.out, is_split=kinds.pop()), **fields))

    def _store(self, op: StoreKV) -> None:
        self._ops.append(replace(op, k=self._values[id(op.k)], v=self._values[id(op.v)]))

    def _attention(self, op: Attention) -> None:
        n_heads = self._share(op.n_heads, "heads")
        self._ops.append(replace(op, out=self._new(op.out, is_split=True), q=self._values[id(op.q)], n_heads=n_heads))

    def _matmul(self, op: MatMul) -> None:
        assert len(op.outs) == 1 and op.residual is None, "the graph is optimized already"
        (out,), (weight,), (bias,) = op.outs, op.weights, op.biases
        x = self._values[id(op.x)]
        if self._is_split(op.x):  # each rank has some columns: the sum of all is the product
            first, stop = self._range(op.x.width, f"columns of {weight.name}", weight.codec.block_size)
            partial = Value(f"{out.name}.partial", out.width, out.rows)
            own_bias = bias if self._rank == 0 else None
            self._ops.append(MatMul((partial,), x, (columns_of(weight, first, stop),), (own_bias,)))
            self._ops.append(AllReduce(self._new(out, is_split=False), partial))
            return
        if id(out) in self._routers:  # every rank chooses
            self._ops.append(replace(op, outs=(self._new(out, is_split=False),), x=x))
            return
        first, stop = self._range(out.width, f"rows of {weight.name}")
        own_bias = None if bias is None else bias[first:stop]
        own = self._new(out, is_split=True)
        self._ops.append(MatMul((own,), x, (weight.part(first, stop),), (own_bias,)))

    def _route(self, op: RouteExperts) -> None:
        experts, weights = (self._new(value, is_split=False) for value in op.outputs)
        self._ops.append(replace(op, logits=self._values[id(op.logits)], experts=experts, weights=weights))

    def _expert_matmul(self, op: ExpertMatMul) -> None:
        assert len(op.outs) == 1, "the graph is optimized already"
        (out,), (weight,) = op.outs, op.weights
        _, n_out, n_in = weight.shape
        x, experts = self._values[id(op.x)], self._values[id(op.experts)]
        if self._is_split(op.x):
            first, stop = self._range(n_in, f"columns of {weight.name}", weight.codec.block_size)
            own, part = self._new(out, is_split=False), columns_of(weight, first, stop)
            self._partial.add(id(out))
        else:
            first, stop = self._range(n_out, f"rows of {weight.name}")
            own, part = self._new(out, is_split=True), expert_rows_of(weight, first, stop)
        self._ops.append(ExpertMatMul((own,), x, experts, (part,)))

    def _combine(self, op: CombineExperts) -> None:
        x, weights = self._values[id(op.x)], self._values[id(op.weights)]
        residual = None if op.residual is None else self._values[id(op.residual)]
        if id(op.x) not in self._partial:
            self._ops.append(CombineExperts(self._new(op.out, is_split=False), x, weights, residual))
            return
        assert residual is None, "the graph is optimized already"
        partial = Value(f"{op.out.name}.partial", op.out.width, op.out.rows)
        self._ops.append(CombineExperts(partial, x, weights))
        self._ops.append(AllReduce(self._new(op.out, is_split=False), partial))
