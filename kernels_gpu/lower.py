"""Lowering: a graph becomes a list of launches for one number of tokens and outputs, over fixed buffers.

What a matmul reads is written in the form that its kernel wants (`operand.Form`): by the op that makes it where that can, else
by a copy. Float32 is what everything else reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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
    Hidden,
    MatMul,
    Op,
    Quantize,
    RMSNorm,
    RouteExperts,
    SelectRows,
    StoreKV,
)
from pyinfer.kernels_gpu.bounds import Lengths, float16_factor, normed_lengths
from pyinfer.kernels_gpu.buckets import DECODE_ROWS
from pyinfer.kernels_gpu.fusion import AttentionGroup, CombineNormGroup, GatedGroup, Group, NormGroup, SingleOp
from pyinfer.kernels_gpu.launch import Buffer, Reduce
from pyinfer.kernels_gpu.lower_attention import AttentionRules
from pyinfer.kernels_gpu.lower_experts import ExpertRules
from pyinfer.kernels_gpu.matvec import Product, RowNorm, takes_norm
from pyinfer.kernels_gpu.matvec_gated import build_gated_matvec, can_fuse_gated, gated_takes_norm
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.products import build_products, goes_to_cublas, operand_form
from pyinfer.kernels_gpu.program import Program, ProgramShape
from pyinfer.kernels_gpu.rows import (
    BeforeNorm,
    build_add,
    build_gated,
    build_head_norm,
    build_place_columns,
    build_quantize,
    build_rms_norm,
    build_select_rows,
)
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.kernels_gpu.unpack import build_embed

# of a norm's results, for float16 without scales: far from its largest number, and from those that lose digits
_SMALLEST_BOUND, _LARGEST_BOUND = 0.5, 32768.0


def lower(memory: StageMemory, shape: ProgramShape) -> Program:
    """The launches of one step. Without outputs, what works on output rows only is left out."""
    lowering = _Lowering(memory, shape)
    for group in memory.groups:
        lowering.lower(group)
    return lowering.finish()


class _Lowering(AttentionRules, ExpertRules):
    def __init__(self, memory: StageMemory, shape: ProgramShape) -> None:
        super().__init__(memory, shape)
        self._lengths: dict[int, Lengths] = {}  # id of a norm's result -> of its rows
        self._norms: dict[int, RowNorm] = {}  # id of a norm's result -> what the product does that reads it
        self._rules: dict[type[Any], Callable[[Any], None]] = {
            Embed: self._embed,
            Hidden: self._hidden,
            RMSNorm: self._rms_norm,
            Quantize: self._quantize,
            MatMul: self._matmul,
            ApplyRope: self._rope,
            StoreKV: self._store_kv,
            Attention: self._attention,
            GatedActivation: self._gated,
            Add: self._add,
            AllReduce: self._all_reduce,
            GatherColumns: self._gather_columns,
            SelectRows: self._select_rows,
            RouteExperts: self._route_experts,
            ExpertMatMul: self._expert_matmul,
            CombineExperts: self._combine_experts,
            AttentionGroup: self._attention_group,
            NormGroup: self._norm_group,
            CombineNormGroup: self._combine_norm_group,
            GatedGroup: self._gated_group,
        }

    def lower(self, group: Group) -> None:
        if not self.shape.n_outputs and all(self._is_of_outputs(op) for op in group.ops):
            return
        what = group.op if isinstance(group, SingleOp) else group
        self._rules[type(what)](what)
        for op in group.ops:
            self.values.read(*(value for value in op.inputs if value in self.values))

    def finish(self) -> Program:
        results = (self.values[value].data if value in self.values else Buffer(0, 0) for value in self.graph.results)
        return Program(tuple(self.steps), tuple(results))

    @staticmethod
    def _is_of_outputs(op: Op) -> bool:
        return any(value.rows == "outputs" for value in op.outputs)

    def _write_normed(self, op: RMSNorm) -> Operand:
        """The same for a norm of whole rows. What it can give is bounded: where float16 holds that, rows need no scales, and
        cuBLAS writes results that nothing has to be multiplied with any more."""
        self._lengths[id(op.out)] = normed_lengths(op.weight)
        largest = float(np.abs(op.weight).max()) * math.sqrt(op.x.width)
        scaled = not _SMALLEST_BOUND <= largest <= _LARGEST_BOUND
        return self.values.write(op.out, self._form(op.out), self._rows(op.out), scaled=scaled)

    # ---- one rule an op
    def _embed(self, op: Embed) -> None:
        table, ids = self.memory.weights[op.table], self.memory.fields[0].token_ids
        out = self._write(op.out)
        self.steps += build_embed(out.data, table, ids, op.scale, self._rows(op.out))

    def _hidden(self, op: Hidden) -> None:
        self.values.hold(op.out, Operand("f32", op.out.width, self.memory.hidden[id(op.out)]))

    def _rms_norm(self, op: RMSNorm) -> None:
        x, n = self.values[op.x].data, self._rows(op.out)
        weight = self._vector(op.weight)
        if self._goes_into_product(op):
            self.values.share(op.out, op.x)
            self._norms[id(op.out)] = RowNorm(weight, op.eps)
        elif op.weight.size == op.x.width:
            self.steps += build_rms_norm(self._write_normed(op), x, weight, op.eps, n)
        else:
            self.steps += build_head_norm(self._write(op.out), x, weight, op.weight.size, op.eps, n)

    def _goes_into_product(self, op: RMSNorm) -> bool:
        """Whether the product that reads a norm of one row can compute it on its way."""
        readers, device = self.memory.readers(op.out), self.memory.device
        if self._rows(op.out) != 1 or op.weight.size != op.x.width or self._form(op.out) != "a8" or len(readers) != 1:
            return False
        (reader,) = readers
        if not isinstance(reader, MatMul):
            return False
        weights = [self.memory.weights[weight] for weight in reader.weights]
        both = [group for group in self.memory.groups if isinstance(group, GatedGroup) and group.matmul is reader]
        fits = not both or gated_takes_norm(weights[0], device.n_sms, device.arch)
        return fits and takes_norm(weights, device.n_sms, device.arch)

    def _norm_group(self, group: NormGroup) -> None:
        x, residual = self.values[group.x].data, self.values[group.residual].data
        total, out = self._write(group.add.out), self._write_normed(group.norm)
        first = group.before
        before = BeforeNorm(
            residual, total.data, self._vector(first.weight) if first else None, first.eps if first else 0.0
        )
        weight = self._vector(group.norm.weight)
        self.steps += build_rms_norm(out, x, weight, group.norm.eps, self._rows(group.norm.out), before)

    def _combine_norm_group(self, group: CombineNormGroup) -> None:
        op = group.combine
        assert op.residual is not None
        slots, weights, residual = (self.values[value].data for value in (op.x, op.weights, op.residual))
        total, out = self._write(op.out), self._write_normed(group.norm)
        before = BeforeNorm(residual, total.data, slot_weights=weights, n_used=op.weights.width)
        weight = self._vector(group.norm.weight)
        self.steps += build_rms_norm(out, slots, weight, group.norm.eps, self._rows(group.norm.out), before)

    def _quantize(self, op: Quantize) -> None:
        x, form = self.values[op.x], self._form(op.out)
        if form == "f32":
            self.values.share(op.out, op.x)
            return
        self.steps += build_quantize(self._write(op.out, form), x.data, self._rows(op.out))

    def _matmul(self, op: MatMul) -> None:
        if op.residual is not None and self.values.is_last_read(op.residual):
            self.values.share(op.outs[0], op.residual)  # the product is added to what is there
        residual = None if op.residual is None else self.values[op.residual].data
        outs = [(self.values[out] if out in self.values else self._write(out)).data for out in op.outs]
        self._multiply(op, outs, residual)

    def _multiply(
        self, op: MatMul, outs: Sequence[Buffer], residual: Buffer | None = None, *, halves: bool = False
    ) -> None:
        """Float types read x in several forms, so each form's matrices go by themselves."""
        x, n, norm = self.values[op.x], self._rows(op.outs[0]), self._norms.get(id(op.x))
        forms = [operand_form(weight, n) for weight in op.weights]
        for form in dict.fromkeys(forms):
            operand, scratch = x, None
            if x.form != form and norm is None:
                operand, scratch = self.values.operand_scratch(form, n, x.width)
                self.steps += build_quantize(operand, x.data, n)
            products = [
                Product(self.memory.weights[weight], out, None if bias is None else self.memory.weights.vector(bias))
                for weight, out, bias, own in zip(op.weights, outs, op.biases, forms, strict=True)
                if own == form
            ]
            self.steps += build_products(
                operand, products, n, residual, self.memory, self.values, halves=halves, norm=norm
            )
            if scratch is not None:
                self.values.release(scratch)

    def _gated(self, op: GatedActivation) -> None:
        gate, up = self.values[op.gate].data, self.values[op.up].data
        self.steps += build_gated(self._write_operand(op.out), gate, up, op.activation, self._rows(op.out))

    def _gated_group(self, group: GatedGroup) -> None:
        """In one kernel where few rows meet matrices of one type, else one after the other."""
        if isinstance(group.matmul, ExpertMatMul):
            if not self._fuse_gated_experts(group.matmul, group.gated):
                self._expert_matmul(group.matmul)
                self._gated(group.gated)
            return
        op, n = group.gated, self._rows(group.gated.out)
        x, weights = (
            self.values[group.matmul.x],
            dict(zip(map(id, group.matmul.outs), group.matmul.weights, strict=True)),
        )
        gate, up = self.memory.weights[weights[id(op.gate)]], self.memory.weights[weights[id(op.up)]]
        norm = self._norms.get(id(group.matmul.x))
        form = "a8" if norm else x.form
        is_few = n <= DECODE_ROWS and form == operand_form(group.matmul.weights[0], n) and self._form(op.out) != "h16"
        if not is_few or not can_fuse_gated(gate, up):
            self._gated_many(group.matmul, op)
            return
        out, device = self._write_operand(op.out), self.memory.device
        self.steps += build_gated_matvec(
            out, x, gate, up, op.activation, n, n_sms=device.n_sms, arch=device.arch, norm=norm
        )

    def _gated_many(self, matmul: MatMul, op: GatedActivation) -> None:
        """Between both products lies float16 where it is known to hold all of it (`bounds`)."""
        n, x, lengths = self._rows(op.out), self.values[matmul.x], self._lengths.get(id(matmul.x))
        products = [Product(self.memory.weights[weight], Buffer(0, 0)) for weight in matmul.weights]
        rows = [self.memory.lengths.get(product.weight.buffer.ptr) for product in products]
        factor = float16_factor(lengths, rows[0], rows[1], x.width)
        halves = (
            factor is not None and x.form == "h16" and x.scales is None and goes_to_cublas(products, n, self.memory)
        )
        outs = [self.values.write(out, "h16" if halves else "f32", n, scaled=False).data for out in matmul.outs]
        self._multiply(matmul, outs, halves=halves)
        gate, up = self.values[op.gate].data, self.values[op.up].data
        out = self.values.write(op.out, self._form(op.out), n, scaled=factor is None, factor=factor or 1.0)
        self.steps += build_gated(out, gate, up, op.activation, n, halves=halves)

    def _add(self, op: Add) -> None:
        a, b = self.values[op.a].data, self.values[op.b].data
        self.steps += build_add(self._write_operand(op.out), a, b, self._rows(op.out))

    def _all_reduce(self, op: AllReduce) -> None:
        self.values.share(op.out, op.x)
        self.steps.append(Reduce(self.values[op.x].data, self._rows(op.x) * op.x.width))

    def _gather_columns(self, op: GatherColumns) -> None:
        n, part, total = self._rows(op.out), op.x.width, op.out.width
        out = self._write(op.out).data
        self.steps += build_place_columns(out, self.values[op.x].data, part, op.rank * part, total, n)
        self.steps.append(Reduce(out, n * total))

    def _select_rows(self, op: SelectRows) -> None:
        if self.shape.all_rows:
            self.values.share(op.out, op.x)
            return
        rows = self.memory.fields[0].output_rows
        x = self.values[op.x].data
        self.steps += build_select_rows(self._write_operand(op.out), x, rows, self._rows(op.out))
