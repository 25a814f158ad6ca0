"""Attention over pages: float32 arithmetic, keys and values widened in registers.

Every query row reduces over partitions of 256 absolute positions, each with its own maximum, sum and weighted V, merged in
ascending order (online softmax, arXiv:1805.02867). Rows of one sequence and KV head are computed up to 8 at a time with the
same operations in the same order for each row; a mask or a window only contributes exact zeros. So a row's result is the
same in decode, in a chunk and in a whole prompt. With fewer heads than threads a sequence's partitions are shared out in
spans: each partition's part is stored, and `attention_merge` merges them in the same order.
"""

from __future__ import annotations

from pyinfer.kernels_cpu.attention_args import PARTITION, AttentionArg
from pyinfer.kernels_cpu.attention_rows import AttentionRows
from pyinfer.kernels_cpu.compiler import Body, define
from pyinfer.kernels_cpu.kv_format import kv_format
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, i32, i64

ROW_TILES = (8, 4, 2, 1)  # and as many rows as a token has, so that its keys and values are read once


def scratch_bytes(head_dim: int) -> int:
    """Queries [head_dim][8], probabilities [8][256], weighted values [8][head_dim]."""
    return 4 * (8 * head_dim + 8 * PARTITION + 8 * head_dim)


def attention_body(head_dim: int, k_dtype: str, v_dtype: str, token_rows: int) -> Body:
    """For tasks of which one token is `token_rows` query rows."""
    keys, values = kv_format(k_dtype, head_dim), kv_format(v_dtype, head_dim)

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        kernels = {}
        row_tiles = sorted({*ROW_TILES, min(token_rows, ROW_TILES[0])}, reverse=True)
        for rows in row_tiles:
            inner, fn = define(b.module, f"attend_{rows}", e.isa, 8, internal=True)
            AttentionRows(inner, rows, head_dim, keys, values, fn.args).emit()
            inner.b.ret_void()
            kernels[rows] = fn
        n_parts, n_kv, group = (
            e.field(op, i) for i in (AttentionArg.N_PARTS, AttentionArg.N_KV_HEADS, AttentionArg.GROUP)
        )
        tiles = e.ptr(e.field(step, StepField.ATTENTION_TILES))
        raw = [b.ptrtoint(p, i64) for p in (op, step, scratch)]
        n_spans = e.field(step, StepField.N_SPANS)
        with e.loop(last, first) as task:
            span, rest = b.srem(task, n_spans), b.sdiv(task, n_spans)
            part, rest = b.srem(rest, n_parts), b.sdiv(rest, n_parts)
            kv_head, tile = b.srem(rest, n_kv), b.sdiv(rest, n_kv)
            record = e.at(tiles, e.mul(tile, 16))
            sequence, token, count = (b.sext(e.load(e.at(record, 4 * i), i32, 4), i64) for i in range(3))
            n_rows = b.mul(count, group)
            start = b.sdiv(b.mul(part, n_rows), n_parts)
            end = b.sdiv(b.mul(e.add(part, 1), n_rows), n_parts)

            place = [sequence, token, kv_head, span]

            def call(rows: int, at: Reg, place: list[Reg] = place) -> None:
                b.call(kernels[rows], [*raw, *place, at])

            full = b.add(start, b.and_(b.sub(end, start), e.c(-8)))
            with e.loop(full, start, 8) as row:
                call(8, row)
            at, left = full, b.sub(end, full)
            for rows in row_tiles[1:]:
                some = b.select(b.icmp_signed(">=", left, e.c(rows)), e.c(rows), e.c(0))
                with e.when(b.icmp_signed("!=", some, e.c(0))):
                    call(rows, at)
                at, left = b.add(at, some), b.sub(left, some)

    return body
