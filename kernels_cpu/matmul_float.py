"""The matmul of F32, F16 and BF16 weights: float32 activations, weights widened in registers.

Weights lie as [columns][16 rows]. Even and odd columns have an accumulator each, added at the end, in every tile size.
"""

from __future__ import annotations

from typing import Any

from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.matmul_block import finish_tile
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.repack import EmbedArg, RepackArg
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i16, i32, vector
from pyinfer.kernels_cpu.weight_format import ROWS

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def load_floats(e: Emitter, kind: str, pointer: Reg, n: int) -> Reg:
    """n elements of a float type as <n x float>."""
    if kind == "F32":
        return e.load(pointer, vector(f32, n), 4)
    if kind == "F16":
        return e.load_halves(pointer, n)
    wide = e.b.zext(e.load(pointer, vector(i16, n), 2), vector(i32, n))
    return e.b.bitcast(e.b.shl(wide, e.const(i32, [16] * n)), vector(f32, n))


def emit_float_tile(kind: str) -> Any:
    size = FLOAT_BYTES[kind]

    def emit(e: Emitter, rows: int, args: Any) -> None:
        n_columns, weights, x, x_row, *rest = args
        b = e.b
        vectors = ROWS // e.L
        sums = [[[e.var(e.floats(0.0)) for _ in range(2)] for _ in range(vectors)] for _ in range(rows)]
        w0 = e.ptr(weights)
        x_rows = [e.ptr(b.add(x, e.mul(x_row, t))) for t in range(rows)]
        with e.loop(n_columns, 0, 2) as k:
            w = e.at(w0, e.mul(k, ROWS * size))
            at = e.mul(k, 4)
            for parity in range(2):
                inputs = [e.splat_float(e.at(e.at(row, at), 4 * parity)) for row in x_rows]
                for v in range(vectors):
                    weight = load_floats(e, kind, e.at(w, (parity * ROWS + v * e.L) * size), e.L)
                    for t in range(rows):
                        slot = sums[t][v][parity]
                        e.set(slot, e.fma(inputs[t], weight, e.get(slot)))
        finish_tile(e, [[b.fadd(e.get(even), e.get(odd)) for even, odd in row] for row in sums], rest)

    return emit


def repack_float_body(kind: str) -> Body:
    """Rows of a float type to [columns][16 rows]; a task is a group of 16 rows, columns are a multiple of 16."""
    element = {"F32": i32}.get(kind, i16)
    size = FLOAT_BYTES[kind]

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        n_columns, row_bytes = e.field(op, RepackArg.N_RECORDS), e.field(op, RepackArg.ROW_BYTES)
        src, dst = e.ptr(e.field(op, RepackArg.SOURCE)), e.ptr(e.field(op, RepackArg.TARGET))
        with e.loop(last, first) as group:
            rows_here = e.min(e.sub(e.field(op, RepackArg.N_ROWS), e.mul(group, ROWS)), ROWS)
            group_dst = e.at(dst, e.mul(e.mul(group, n_columns), ROWS * size))
            with e.loop(rows_here) as row:
                row_src = e.at(src, e.mul(e.add(e.mul(group, ROWS), row), row_bytes))
                row_dst = e.at(group_dst, e.mul(row, size))
                with e.loop(n_columns, 0, 16) as k:
                    values = e.load(e.at(row_src, e.mul(k, size)), vector(element, 16), size)
                    target = e.at(row_dst, e.mul(k, ROWS * size))
                    for j in range(16):
                        e.store(e.b.extract_element(values, i32(j)), e.at(target, j * ROWS * size), size)

    return body


def embed_float_body(kind: str) -> Body:
    """out[m] = table[token_ids[m]] * scale for a float table."""
    size = FLOAT_BYTES[kind]

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        table, out = e.ptr(e.field(op, EmbedArg.TABLE)), e.ptr(e.field(op, EmbedArg.OUT))
        ids = e.ptr(e.field(step, StepField.TOKEN_IDS))
        factor = e.splat(e.load(e.at(op, 8 * EmbedArg.SCALE), f32, 4), 16)
        with e.loop(last, first) as m:
            token = e.b.sext(e.load(e.at(ids, e.mul(m, 4)), i32, 4), e.c(0).type)
            row = e.at(table, e.mul(token, e.field(op, EmbedArg.ROW_BYTES)))
            target = e.at(out, e.mul(m, e.field(op, EmbedArg.OUT_STRIDE)))
            with e.loop(e.field(op, EmbedArg.N_BLOCKS)) as r:
                values = load_floats(e, kind, e.at(row, e.mul(r, 16 * size)), 16)
                e.store(e.b.fmul(values, factor), e.at(target, e.mul(r, 64)), 4)

    return body
