"""The rules of lowering for a mixture of experts."""

from __future__ import annotations

from pyinfer.graph.ops import CombineExperts, ExpertMatMul, GatedActivation, RouteExperts, Value
from pyinfer.kernels_gpu.buckets import DECODE_ROWS
from pyinfer.kernels_gpu.expert_tiles import SlotTiles, build_expert_matmul, build_tiles, tiled_products, tiles_bytes
from pyinfer.kernels_gpu.experts import (
    Slots,
    build_combine,
    build_expert_matvec,
    build_gated_expert_matvec,
    build_route,
    can_fuse_gated_experts,
)
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.products import operand_form
from pyinfer.kernels_gpu.program import ProgramBuilder, ProgramShape
from pyinfer.kernels_gpu.rows import build_quantize
from pyinfer.kernels_gpu.stage_memory import StageMemory


class ExpertRules(ProgramBuilder):
    """One method an op."""

    def __init__(self, memory: StageMemory, shape: ProgramShape) -> None:
        super().__init__(memory, shape)
        self._sorted: tuple[tuple[int, int], SlotTiles] | None = (
            None  # the latest, by the chosen experts and its tiles' rows
        )

    def _route_experts(self, op: RouteExperts) -> None:
        logits, weights = self.values[op.logits].data, self._write(op.weights).data
        experts = self._write(op.experts).data if self.memory.readers(op.experts) else None
        fields = self.memory.fields[0]
        present = fields.sequence_of_token if op.weights.rows == "tokens" else fields.output_rows
        self.steps += build_route(
            experts, weights, logits, present, self._rows(op.weights), op.n_used, op.logits.width,
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
                for product in tiled_products(products, slots, self.memory.routes.gpu):
                    tiles = self._tiles_of(op.experts, slots, product.cut.rows)
                    self.steps += build_expert_matmul(x, product, slots, tiles)
            else:
                assert n <= DECODE_ROWS or form == "f32"
                self.steps += build_expert_matvec(x, products, slots, n_sms=device.n_sms, arch=device.arch)
            if copied is not None:
                self.values.release(copied)

    def _tiles_of(self, experts: Value, slots: Slots, tile_rows: int) -> SlotTiles:
        """Slots sorted once for all products of a layer that have tiles of one size."""
        key = id(experts), tile_rows
        if self._sorted is None or self._sorted[0] != key:
            if self._sorted is not None:
                self.values.release(self._sorted[1].memory)
            memory = self.values.scratch(tiles_bytes(slots, tile_rows))
            tiles, sort = build_tiles(slots, tile_rows, memory)
            self.steps += sort
            self._sorted = key, tiles
        return self._sorted[1]

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
