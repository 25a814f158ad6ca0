"""The rules of lowering for attention: rope, keys and values into their pages, and the attention over them."""

from __future__ import annotations

from dataclasses import replace

from pyinfer.graph.ops import ApplyRope, Attention, StoreKV
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.attention import (
    AttentionScratch,
    AttentionShape,
    FusedRope,
    QueryRope,
    StepShape,
    build_attention,
    can_fuse_rope,
    can_turn_queries,
    direct_form,
    scratch_sizes,
)
from pyinfer.kernels_gpu.fusion import AttentionGroup
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.program import ProgramBuilder, ProgramShape
from pyinfer.kernels_gpu.rope import HeadNorms, HeadShape, build_rope, build_rope_angles, build_rope_store, build_store
from pyinfer.kernels_gpu.stage_memory import StageMemory


class AttentionRules(ProgramBuilder):
    """One method an op or group."""

    def __init__(self, memory: StageMemory, shape: ProgramShape) -> None:
        super().__init__(memory, shape)
        self._step = StepShape(shape.kind, shape.n_tokens, shape.n_sequences)
        self._angles: set[int] = set()  # ropes whose angles this program has computed

    def _turns(self, rope: Rope) -> Buffer:
        """The angles of this rope, computed once a step before they are first read."""
        frequencies, angles = self.memory.rope(rope)
        if id(rope) not in self._angles:
            self._angles.add(id(rope))
            fields = self.memory.fields[0]
            self.steps += build_rope_angles(angles, rope, frequencies, fields, self.shape.n_tokens)
        return angles

    def _rope(self, op: ApplyRope) -> None:
        angles, x, out = self._turns(op.rope), self.values[op.x].data, self._write(op.out)
        self.steps += build_rope(out.data, x, op.x.width, op.head_dim, op.rope, angles, self.shape.n_tokens)

    def _heads(self, layer: int, n_heads: int) -> HeadShape:
        kv = self.graph.kv_layers[layer]
        return HeadShape(n_heads, kv.n_kv_heads, kv.head_dim, self.memory.config.block_size)

    def _store_kv(self, op: StoreKV) -> None:
        shape, pages = self._heads(op.layer, 0), self.memory.pages.layer(op.layer)
        k, v = self.values[op.k].data, self.values[op.v].data
        self.steps += build_store(k, v, shape, self.memory.layer_fields(op.layer), pages, self.shape.n_tokens)

    def _attention(self, op: Attention) -> None:
        self._attend(op, self._shape(op), self.values[op.q].data, None)

    def _attention_group(self, group: AttentionGroup) -> None:
        op, n = group.attention, self.shape.n_tokens
        q, k, v = (self.values[value].data for value in (group.q, group.k, group.v))
        heads, pages = self._heads(op.layer, op.n_heads), self.memory.pages.layer(op.layer)
        fields, shape = self.memory.layer_fields(op.layer), self._shape(op, group.key_bias)
        if group.rope is None:
            self.steps += build_store(k, v, heads, fields, pages, n)
            self._attend(op, shape, q, None)
            return
        norms = None
        if group.q_norm is not None and group.k_norm is not None:
            weights = self._vector(group.q_norm.weight), self._vector(group.k_norm.weight)
            norms = HeadNorms(*weights, group.q_norm.eps)
        angles = self._turns(group.rope)
        if can_fuse_rope(shape, self._step):
            self._attend(op, shape, q, FusedRope(k, v, group.rope, angles, norms))
            return
        if norms is None and can_turn_queries(group.rope, shape, self._step, pages, self.memory.device):
            keys = replace(heads, n_heads=0)
            self.steps += build_rope_store(q, q, k, v, keys, group.rope, angles, fields, pages, n)
            self._attend(op, shape, q, None, QueryRope(group.rope, angles))
            return
        self.steps += build_rope_store(q, q, k, v, heads, group.rope, angles, fields, pages, n, norms)
        self._attend(op, shape, q, None)

    def _shape(self, op: Attention, key_bias: bool = False) -> AttentionShape:
        window, heads = self.graph.kv_layers[op.layer].window, self._heads(op.layer, op.n_heads)
        return AttentionShape(heads, op.scale, window, self.memory.config.n_ctx, exact_queries=key_bias)

    def _attend(
        self, op: Attention, shape: AttentionShape, q: Buffer, fused: FusedRope | None, turns: QueryRope | None = None
    ) -> None:
        device, pages, form = self.memory.device, self.memory.pages.layer(op.layer), self._form(op.out)
        direct = direct_form(form, shape, self._step, pages, device)  # a mean of float16 values needs no scales
        out = self.values.write(op.out, form, self._rows(op.out), scaled=direct != "h16")
        sizes = scratch_sizes(out.form, shape, self._step, pages, device)
        partial = self.values.scratch(sizes.partial)
        rows = self.values.scratch(sizes.rows) if sizes.rows else None
        scratch = AttentionScratch(partial, self.memory.counters(sizes.tickets), rows)
        fields = self.memory.layer_fields(op.layer)
        self.steps += build_attention(out, q, shape, self._step, fields, pages, device, scratch, fused, turns)
        for slab in (partial, rows):
            if slab is not None:
                self.values.release(slab)
