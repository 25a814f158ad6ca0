"""The rules of lowering for a mixture of experts."""

from __future__ import annotations

from pyinfer.graph.ops import CombineExperts, ExpertMatMul, GatedActivation, RouteExperts
from pyinfer.kernels_gpu.buckets import DECODE_ROWS
from pyinfer.kernels_gpu.experts import (
    Slots,
    build_combine,
    build_expert_matmul,
    build_expert_matvec,
    build_gated_expert_matvec,
    build_route,
    can_fuse_gated_experts,
    expert_scratch,
)
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.products import operand_form
from pyinfer.kernels_gpu.program import ProgramBuilder
from pyinfer.kernels_gpu.rows import build_quantize


class ExpertRules(ProgramBuilder):
    """One method an op."""

    def _route_experts(self, op: RouteExperts) -> None:
        logits, weights = self.values[op.logits].data, self._write(op.weights).data
        experts = self._write(op.experts).data if self.memory.readers(op.experts) else None
        self.steps += build_route(
            experts, weights, logits, self._rows(op.weights), op.n_used, op.logits.width,
            normalize=op.normalize, scale=op.scale, scoring=op.scoring,
        )  # fmt: skip

    def _expert_matmul(self, op: ExpertMatMul) -> None:
        """Each form's matrices by themselves, as in a `MatMul`."""
        device, n = self.memory.device, self._rows(op.outs[0])
        slots = Slots(self.values[op.experts].data, n, op.n_used, op.weights[0].shape[0])
        outs = [self._write(out).data for out in op.outs]
        forms = [operand_form(weight, n) for weight in op.weights]
        for form in dict.fromkeys(forms):
            x, copied = self.values[op.x], None
            if x.form != form:
                operand, copied = self.values.operand_scratch(form, n, x.width)
                self.steps += build_quantize(operand, x.data, n)
                x = operand
            products = [
                Product(self.memory.weights[weight], out)
                for weight, out, own in zip(op.weights, outs, forms, strict=True)
                if own == form
            ]
            if form == "h16":
                gpu = self.memory.routes.gpu
                scratch = self.values.scratch(expert_scratch(products, slots, gpu))
                self.steps += build_expert_matmul(x, products, slots, scratch, gpu)
                self.values.release(scratch)
            else:
                assert n <= DECODE_ROWS or form == "f32"
                self.steps += build_expert_matvec(x, products, slots, n_sms=device.n_sms, arch=device.arch)
            if copied is not None:
                self.values.release(copied)

    def _fuse_gated_experts(self, op: ExpertMatMul, gated: GatedActivation) -> bool:
        """Both products and their activation in one launch, where few slots read matrices of one type; whether it was done."""
        n, device = self._rows(gated.out), self.memory.device
        x, form = self.values[op.x], self._form(gated.out)
        weights = dict(zip(map(id, op.outs), op.weights, strict=True))
        gate, up = (self.memory.weights[weights[id(value)]] for value in (gated.gate, gated.up))
        n_experts = op.weights[0].shape[0]
        is_few = n <= DECODE_ROWS and x.form == operand_form(op.weights[0], n) and form != "h16"
        if not is_few or not can_fuse_gated_experts(gate, up, n_experts):
            return False
        slots = Slots(self.values[op.experts].data, n, op.n_used, n_experts)
        out = self._write(gated.out, form)
        self.steps += build_gated_expert_matvec(
            out, x, gate, up, gated.activation, slots, n_sms=device.n_sms, arch=device.arch
        )
        return True

    def _combine_experts(self, op: CombineExperts) -> None:
        x, weights = self.values[op.x].data, self.values[op.weights].data
        residual = None if op.residual is None else self.values[op.residual].data
        out = self._write(op.out).data
        self.steps += build_combine(out, x, weights, op.out.width, self._rows(op.out), op.weights.width, residual)
