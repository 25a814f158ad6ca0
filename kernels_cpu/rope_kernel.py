"""Rotary embedding of every head of a row, from a table of cosines and sines."""

from __future__ import annotations

from enum import IntEnum

from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.opcode import OpField, StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i32, i64, vector


class RopeArg(IntEnum):
    """Operands of `rope`; a task is a token. Out may be x itself."""

    X = OpField.ARGS
    X_STRIDE = OpField.ARGS + 1
    OUT = OpField.ARGS + 2
    OUT_STRIDE = OpField.ARGS + 3
    TABLE = OpField.ARGS + 4  # float32 [n_ctx][2][n_dims/2]: cosines, then sines
    N_HEADS = OpField.ARGS + 5


def rope_body(head_dim: int, n_dims: int, pairing: str) -> Body:
    half = n_dims // 2
    lanes = next(n for n in (16, 8, 4, 2, 1) if half % n == 0)
    wide = vector(f32, lanes)

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        positions = e.ptr(e.field(step, StepField.POSITIONS))
        x, out, table = (e.ptr(e.field(op, i)) for i in (RopeArg.X, RopeArg.OUT, RopeArg.TABLE))
        x_stride, out_stride = e.field(op, RopeArg.X_STRIDE), e.field(op, RopeArg.OUT_STRIDE)
        with e.loop(last, first) as m:
            position = b.sext(e.load(e.at(positions, e.mul(m, 4)), i32, 4), i64)
            angles = e.at(table, e.mul(position, n_dims * 4))
            with e.loop(e.field(op, RopeArg.N_HEADS)) as head:
                at_head = e.mul(head, head_dim * 4)
                source, target = (
                    e.at(e.at(x, e.mul(m, x_stride)), at_head),
                    e.at(e.at(out, e.mul(m, out_stride)), at_head),
                )
                for i in range(0, half, lanes):
                    cos, sin = (e.load(e.at(angles, 4 * (part * half + i)), wide, 4) for part in (0, 1))
                    if pairing == "half":
                        u, v = (e.load(e.at(source, 4 * (part * half + i)), wide, 4) for part in (0, 1))
                    else:
                        both = e.load(e.at(source, 8 * i), vector(f32, 2 * lanes), 4)
                        u, v = (e.shuffle(both, range(part, 2 * lanes, 2)) for part in (0, 1))
                    p = b.fsub(b.fmul(u, cos), b.fmul(v, sin))
                    q = b.fadd(b.fmul(u, sin), b.fmul(v, cos))
                    if pairing == "half":
                        e.store(p, e.at(target, 4 * i), 4)
                        e.store(q, e.at(target, 4 * (half + i)), 4)
                    else:
                        order = [k // 2 + lanes * (k % 2) for k in range(2 * lanes)]
                        e.store(e.shuffle(p, order, q), e.at(target, 8 * i), 4)
                for i in range(n_dims, head_dim):
                    e.store(e.load(e.at(source, 4 * i), f32, 4), e.at(target, 4 * i), 4)

    return body
