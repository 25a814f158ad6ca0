"""The matmul of BF16 weights where the CPU has dot products of bfloat16 pairs (AVX512-BF16): "bf16" activations.

Weights lie as [columns / 2][16 rows][2]. Even and odd pairs have an accumulator each, added at the end, in every tile size.
"""

from __future__ import annotations

from typing import Any

from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.matmul_block import finish_tile
from pyinfer.kernels_cpu.repack import RepackArg
from pyinfer.kernels_cpu.simd import Emitter, Reg, i32, vector
from pyinfer.kernels_cpu.weight_format import ROWS

BFLOAT_PAIRS = "BF16_PAIRS"  # the kind of weights packed for this matmul


def emit_bfloat_tile(e: Emitter, rows: int, args: Any) -> None:
    """`rows` activations times 16 weight rows; columns are a multiple of 32."""
    n_columns, weights, x, x_row, *rest = args
    b = e.b
    sums = [[e.var(e.floats(0.0)) for _ in range(2)] for _ in range(rows)]
    w0 = e.ptr(weights)
    x_rows = [e.ptr(b.add(x, e.mul(x_row, t))) for t in range(rows)]
    with e.loop(n_columns, 0, 4) as k:
        w, at = e.at(w0, e.mul(k, 2 * ROWS)), e.mul(k, 2)
        for pair in range(2):
            weight = e.load(e.at(w, pair * 4 * ROWS), e.vi)
            for t in range(rows):
                slot = sums[t][pair]
                e.set(slot, e.dot_bfloat(e.get(slot), weight, e.splat_int(e.at(e.at(x_rows[t], at), 4 * pair))))
    finish_tile(e, [[b.fadd(e.get(even), e.get(odd))] for even, odd in sums], rest)


def repack_bfloat_body() -> Body:
    """Rows of BF16 to [columns / 2][16 rows][2]; a task is a group of 16 rows, columns are a multiple of 32."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        n_columns, row_bytes = e.field(op, RepackArg.N_RECORDS), e.field(op, RepackArg.ROW_BYTES)
        src, dst = e.ptr(e.field(op, RepackArg.SOURCE)), e.ptr(e.field(op, RepackArg.TARGET))
        with e.loop(last, first) as group:
            rows_here = e.min(e.sub(e.field(op, RepackArg.N_ROWS), e.mul(group, ROWS)), ROWS)
            group_dst = e.at(dst, e.mul(e.mul(group, n_columns), 2 * ROWS))
            with e.loop(rows_here) as row:
                row_src = e.at(src, e.mul(e.add(e.mul(group, ROWS), row), row_bytes))
                row_dst = e.at(group_dst, e.mul(row, 4))
                with e.loop(n_columns, 0, 32) as k:
                    pairs = e.load(e.at(row_src, e.mul(k, 2)), vector(i32, 16), 2)
                    target = e.at(row_dst, e.mul(k, 2 * ROWS))
                    for j in range(16):
                        e.store(e.b.extract_element(pairs, i32(j)), e.at(target, j * 4 * ROWS), 4)

    return body
