"""Launches of attention: which kernel takes which tokens, into how many splits, and with what tiles.

`attention_decode.cu` takes tokens one by one and splits their sequences over the multiprocessors; `attention_prefill.cu` takes
tiles of many tokens of a sequence to the tensor cores. A step that only decodes runs the first, one of prompts the second, one
of both runs both, each for its own sequences. float32 pages, heads that are no multiple of 16 columns and bfloat16 before sm_80
are always the first's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pyinfer.errors import ModelError
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer, Defines, Kernel, Launch
from pyinfer.kernels_gpu.operand import FORMS, Form, Operand
from pyinfer.kernels_gpu.pages import LayerPages
from pyinfer.kernels_gpu.rope import HeadNorms, HeadShape, kv_args, kv_defines, pairing_defines
from pyinfer.kernels_gpu.rows import build_quantize
from pyinfer.kernels_gpu.step_buffer import StepFields

StepKind = Literal["decode", "prompt", "mixed"]
_WARPS = 4
_MAX_HEAD = 256
_DECODE_GROUP = 8  # query heads that a block of the decode kernel holds in registers
_PREFILL_GROUP = 16
_MAX_SPLITS = 64
_MAX_PREFILL_SPLITS = 8
FEW_TOKENS = 4  # in a mixed step a sequence with no more of them is decoded


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention layer."""

    heads: HeadShape
    scale: float
    window: int | None
    n_ctx: int  # of the longest sequence
    # whether queries keep more than the bits of the keys' type in prompts: a bias on keys makes scores large (qwen2)
    exact_queries: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads.n_heads // self.heads.n_kv_heads

    @property
    def width(self) -> int:
        return self.heads.n_heads * self.heads.head_dim


@dataclass(frozen=True, slots=True)
class StepShape:
    """The program's rows. kind: "decode" if every sequence has one token in the step, "prompt" if all have many, "mixed" if
    each sequence decides by its number of tokens."""

    kind: StepKind
    n_tokens: int
    max_sequences: int

    @property
    def n_sequences(self) -> int:
        return min(self.n_tokens, self.max_sequences)


@dataclass(frozen=True, slots=True)
class FusedRope:
    """Rope and store of a step in which every sequence has one token: the decode kernel does them on its way."""

    k: Buffer  # float32 [n_tokens, n_kv_heads * head_dim], not rotated; neither is q then
    v: Buffer
    rope: Rope
    angles: Buffer
    norms: HeadNorms | None = None


@dataclass(frozen=True, slots=True)
class QueryRope:
    """Rope of a prompt's queries, which the prompt kernel does as it reads them; keys are rotated when they are stored."""

    rope: Rope
    angles: Buffer


@dataclass(frozen=True, slots=True)
class AttentionScratch:
    """Memory that all layers share. `tickets` must be zero before its first use, and is zero after each."""

    partial: Buffer
    tickets: Buffer
    rows: Buffer | None  # float32 [n_tokens, width]; needed where `direct_form` differs from the form asked for


@dataclass(frozen=True, slots=True)
class ScratchSizes:
    """Bytes of each part of `AttentionScratch`; 0: not needed."""

    partial: int
    tickets: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Decode:
    group: int
    passes: int
    splits: int
    rows: int  # blocks in the direction of tokens
    unroll: int
    min_tiles: int
    max_tokens: int


def check_heads(head_dim: int) -> None:
    """ModelError for heads that no kernel here takes."""
    if head_dim % 8 or head_dim > _MAX_HEAD:
        raise ModelError(
            f"attention heads have {head_dim} columns; the GPU kernels need a multiple of 8 up to {_MAX_HEAD}: "
            "run this model on the CPU, with --n-gpu-layers 0"
        )


def can_fuse_rope(shape: AttentionShape, step: StepShape) -> bool:
    """Whether `FusedRope` may be given; the step must be one where every sequence has one token."""
    return step.kind == "decode" and shape.group <= _DECODE_GROUP


def can_turn_queries(rope: Rope, shape: AttentionShape, step: StepShape, pages: LayerPages, device: Device) -> bool:
    """Whether `QueryRope` may be given: no other kernel reads these queries."""
    return rope.n_dims % 4 == 0 and _uses_prefill(shape, step, pages, device) and step.kind == "prompt"


def direct_form(form: Form, shape: AttentionShape, step: StepShape, pages: LayerPages, device: Device) -> Form:
    """The form in which the kernels themselves can write; if it is not `form`, float32 is written and then rounded."""
    if form == "h16":  # what is a mean of float16 values needs no factor that only the whole row can tell
        return "h16" if pages.v_type in ("f16", "q8_0") else "f32"
    if form == "a8":
        group = min(shape.group, _DECODE_GROUP)
        parts = (group * shape.heads.head_dim, shape.group % group * shape.heads.head_dim)
        whole = all(columns % 32 == 0 for columns in parts)
        return "a8" if whole and not _uses_prefill(shape, step, pages, device) else "f32"
    return "f32"


def scratch_sizes(
    form: Form, shape: AttentionShape, step: StepShape, pages: LayerPages, device: Device
) -> ScratchSizes:
    """What `build_attention` needs for this layer and step."""
    check_heads(shape.heads.head_dim)
    rows = 4 * step.n_tokens * shape.width if direct_form(form, shape, step, pages, device) != form else 0
    partial = tickets = 0
    if _uses_decode(shape, step, pages, device):
        plan = _plan_decode(shape, step, pages, device)
        pairs = plan.rows * shape.heads.n_kv_heads * plan.passes
        record = -(-plan.group * (shape.heads.head_dim + 2) // 4) * 4
        partial, tickets = 4 * pairs * plan.splits * record, 4 * pairs
    if _uses_prefill(shape, step, pages, device):
        tiles = _plan_prefill(shape, step, pages, device)
        if tiles.splits > 1:
            pairs = tiles.grid[0] * tiles.grid[1]
            record = tiles.rows * (shape.heads.head_dim + 2)
            partial, tickets = max(partial, 4 * pairs * tiles.splits * record), max(tickets, 4 * pairs)
    return ScratchSizes(partial, tickets, rows)


def build_attention(
    out: Operand, q: Buffer, shape: AttentionShape, step: StepShape, fields: StepFields, pages: LayerPages, device: Device,
    scratch: AttentionScratch, fused: FusedRope | None = None, turns: QueryRope | None = None,
) -> list[Launch]:  # fmt: skip
    """out = softmax(scale * q K^T) V of every token over the pages of its sequence; padding rows are zeros.

    q is float32 [n_tokens, width], rotated unless `fused` or `turns` does that; without `fused` the step's keys and values are
    in the pages already.
    Where `direct_form` is "h16" all scales are 1, and `out` need not have any.
    """
    assert fused is None or can_fuse_rope(shape, step)
    assert turns is None or can_turn_queries(turns.rope, shape, step, pages, device)
    direct = direct_form(out.form, shape, step, pages, device)
    target = out
    if direct != out.form:
        assert scratch.rows is not None
        target = Operand("f32", out.width, scratch.rows)
    launches = []
    if _uses_prefill(shape, step, pages, device):
        launches.append(_prefill(target, q, shape, step, fields, pages, device, scratch, turns))
    if _uses_decode(shape, step, pages, device):
        launches.append(_decode(target, q, shape, step, fields, pages, device, scratch, fused))
    return launches if target is out else [*launches, *build_quantize(out, target.data, step.n_tokens)]


def _has_tensor_form(shape: AttentionShape, pages: LayerPages, device: Device) -> bool:
    types = {pages.k_type, pages.v_type}
    return (
        "f32" not in types
        and shape.heads.head_dim % 16 == 0
        and (device.arch >= 80 or "bf16" not in types)
        and _prefill_tiles(shape, 1, pages, device) is not None
    )


def _uses_prefill(shape: AttentionShape, step: StepShape, pages: LayerPages, device: Device) -> bool:
    return step.kind != "decode" and _has_tensor_form(shape, pages, device)


def _uses_decode(shape: AttentionShape, step: StepShape, pages: LayerPages, device: Device) -> bool:
    return step.kind != "prompt" or not _has_tensor_form(shape, pages, device)


def _common_defines(shape: AttentionShape, pages: LayerPages) -> Defines:
    return (
        ("HEAD", shape.heads.head_dim), *kv_defines(shape.heads, pages), ("PER_KV", shape.group),
        ("WINDOW", shape.window or 0),
    )  # fmt: skip


def _plan_decode(shape: AttentionShape, step: StepShape, pages: LayerPages, device: Device) -> _Decode:
    group = min(shape.group, _DECODE_GROUP)
    passes = -(-shape.group // group)
    max_tokens = FEW_TOKENS if _uses_prefill(shape, step, pages, device) else 0
    rows = min(step.n_tokens, step.n_sequences * max_tokens) if max_tokens else step.n_tokens
    lanes = 1 << (shape.heads.head_dim // 8 - 1).bit_length()
    at_once = 32 // lanes
    registers = group * (2 if "f32" in (pages.k_type, pages.v_type) else 1)  # what a position more would take
    unroll = max(1, min(8 if at_once == 1 and registers <= 4 else 4 if registers <= 8 else 2, 32 // at_once))
    tile = _WARPS * unroll * at_once
    blocks = rows * shape.heads.n_kv_heads * passes
    wanted = (3 if group <= 4 else 2) * device.n_sms  # that fit at a time, by their registers
    splits = max(4, wanted // blocks)  # a long sequence among many short ones would be one block's alone
    span = 128 if blocks * 8 <= wanted else 256  # positions that are worth a split
    min_tiles = max(1, span // tile)
    longest = min(shape.n_ctx, shape.window + tile if shape.window else shape.n_ctx)
    splits = max(1, min(splits, _MAX_SPLITS, longest // (min_tiles * tile)))
    return _Decode(group, passes, splits, rows, unroll, min_tiles, max_tokens)


def _decode(
    out: Operand, q: Buffer, shape: AttentionShape, step: StepShape, fields: StepFields, pages: LayerPages, device: Device,
    scratch: AttentionScratch, fused: FusedRope | None,
) -> Launch:  # fmt: skip
    plan = _plan_decode(shape, step, pages, device)
    norms = fused.norms if fused else None
    defines: Defines = (
        *_common_defines(shape, pages), ("GROUP", plan.group), ("WARPS", _WARPS), ("UNROLL", plan.unroll),
        ("MIN_TILES", plan.min_tiles), ("MAX_TOKENS", plan.max_tokens), ("OUT", FORMS.index(out.form)),
        ("FUSED", int(fused is not None)), *(pairing_defines(fused.rope, norms is not None) if fused else ()),
    )  # fmt: skip
    return Launch(
        Kernel("attention_decode.cu", "attention_decode", defines),
        grid=(plan.splits, shape.heads.n_kv_heads * plan.passes, plan.rows),
        block=(32 * _WARPS, 1, 1),
        args=(
            q, shape.scale * math.log2(math.e), *kv_args(pages), fields.positions, fields.slots, fields.sequence_of_token,
            fields.sequence_starts, step.n_sequences, fields.page_tables, fields.table_stride, scratch.partial,
            scratch.tickets, out.data, out.scales, out.sums, fused.k if fused else None, fused.v if fused else None,
            fused.angles if fused else None, norms.q_weight if norms else None, norms.k_weight if norms else None,
            norms.eps if norms else 0.0,
        ),
        overlap=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tiles:
    warps: int
    row_tiles: int
    columns: int
    stages: int
    shared_bytes: int

    @property
    def rows(self) -> int:
        return 16 * self.warps * self.row_tiles


@dataclass(frozen=True, slots=True)
class _Prefill:
    tiles: _Tiles
    group: int
    tokens: int
    splits: int
    grid: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.tiles.rows


def _query_parts(shape: AttentionShape, pages: LayerPages) -> int:
    return 2 if pages.k_type == "bf16" or shape.exact_queries else 1


def _prefill_tiles(shape: AttentionShape, n_tokens: int, pages: LayerPages, device: Device) -> _Tiles | None:
    """The largest tiles that fit; None if none does.

    Two tiles of 16 rows a warp halve what is read from shared memory for each product, and eight warps what is read from the
    L2, if there is work for all multiprocessors all the same and registers for it.
    """
    head, query_parts = shape.heads.head_dim, _query_parts(shape, pages)
    tokens = max(1, 128 // min(shape.group, _PREFILL_GROUP))
    # tiles of so many tokens for each multiprocessor
    share = n_tokens * shape.heads.n_kv_heads / (tokens * device.n_sms) if head <= 128 and query_parts == 1 else 0.0
    choices = [(8, 2, 32, 2)] if share >= 3.75 else []
    choices += [(4, 2, 32, 2)] if share >= 2 else []
    choices += [(4, 1, 64, 2)] if head <= 128 else []
    choices += [(4, 1, 32, 2), (4, 1, 32, 1), (2, 1, 16, 1), (1, 1, 16, 1)]
    for warps, row_tiles, columns, stages in choices:
        rows = query_parts * 16 * warps * row_tiles + 2 * stages * columns
        n_bytes = 2 * rows * (head + 8)
        if n_bytes <= device.shared_bytes:
            return _Tiles(warps, row_tiles, columns, stages, n_bytes)
    return None


def _plan_prefill(shape: AttentionShape, step: StepShape, pages: LayerPages, device: Device) -> _Prefill:
    tiles = _prefill_tiles(shape, step.n_tokens, pages, device)
    assert tiles is not None
    group = min(shape.group, _PREFILL_GROUP)
    tokens = tiles.rows // group
    y = shape.heads.n_kv_heads * -(-shape.group // group)
    full = -(-step.n_tokens // tokens)
    spare = min(_MAX_PREFILL_SPLITS, 2 * device.n_sms // (full * y))
    splits = 1 << max(1, spare).bit_length() - 1  # a power of two: each is a kernel of its own
    return _Prefill(tiles, group, tokens, splits, (full + step.n_sequences, y))


def _prefill(
    out: Operand, q: Buffer, shape: AttentionShape, step: StepShape, fields: StepFields, pages: LayerPages, device: Device,
    scratch: AttentionScratch, turns: QueryRope | None,
) -> Launch:  # fmt: skip
    plan = _plan_prefill(shape, step, pages, device)
    tiles = plan.tiles
    defines: Defines = (
        *_common_defines(shape, pages), ("GROUP", plan.group), ("TOKENS", plan.tokens), ("WARPS", tiles.warps),
        ("ROW_TILES", tiles.row_tiles), ("COLUMNS", tiles.columns), ("STAGES", tiles.stages), ("SPLITS", plan.splits),
        ("QUERY_PARTS", _query_parts(shape, pages)),
        ("MIN_TOKENS", FEW_TOKENS + 1 if step.kind == "mixed" else 1), ("OUT", FORMS.index(out.form)),
        *(pairing_defines(turns.rope, False) if turns else ()),
    )  # fmt: skip
    return Launch(
        Kernel("attention_prefill.cu", "attention_prefill", defines),
        grid=(*plan.grid, plan.splits),
        block=(32 * tiles.warps, 1, 1),
        args=(
            q, turns.angles if turns else None, shape.scale * math.log2(math.e), *kv_args(pages), fields.positions,
            fields.sequence_starts, step.n_sequences, fields.page_tables, fields.table_stride, step.n_tokens,
            scratch.partial, scratch.tickets, out.data, out.scales,
        ),
        shared_bytes=tiles.shared_bytes,
        overlap=True,
    )  # fmt: skip
