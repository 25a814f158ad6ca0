"""Ops that work on each row by itself: RMSNorm, quantize, gated activations, add, select rows.

Where `out` can be an "a8" or "bf16" value, the same emitter writes each form from 32 columns held in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

from pyinfer.kernels_cpu.activation_a8 import RECORD, locate, store_block
from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.opcode import OpField, StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i32, i64

Columns32 = Callable[[Reg], Sequence[Reg]]  # byte offset of 32 float columns -> their vectors


class RowArg(IntEnum):
    """Operands of the row ops; strides in bytes."""

    X = OpField.ARGS
    X_STRIDE = OpField.ARGS + 1
    OUT = OpField.ARGS + 2
    OUT_STRIDE = OpField.ARGS + 3  # of an "a8" value: its row bytes
    WIDTH = OpField.ARGS + 4  # columns; for a norm, of one group
    Y = OpField.ARGS + 5  # second input (up, b) or the norm's weight
    Y_STRIDE = OpField.ARGS + 6
    N_PARTS = OpField.ARGS + 7  # a row is cut into this many tasks; for a norm, the groups in a row
    ROWS_FIELD = OpField.ARGS + 8  # the StepField that counts rows
    EPS = OpField.ARGS + 9  # float32 bits


def load_columns(e: Emitter, pointer: Reg, n: int = 32) -> list[Reg]:
    return [e.load(e.at(pointer, 4 * e.L * v), e.vf, 4) for v in range(n // e.L)]


def _store_columns(e: Emitter, values: Sequence[Reg], pointer: Reg) -> None:
    for v, value in enumerate(values):
        e.store(value, e.at(pointer, 4 * e.L * v), 4)


class _RowWriter:
    """Where 32-column blocks of one output row go, as floats or quantized."""

    def __init__(self, e: Emitter, op: Reg, step: Reg, row: Reg, dtype: str) -> None:
        self.e, self.dtype = e, dtype
        out, stride = e.ptr(e.field(op, RowArg.OUT)), e.field(op, RowArg.OUT_STRIDE)
        if dtype != "a8":
            self.base = e.at(out, e.mul(row, stride))
            return
        n_rows = e.load(e.at(step, e.mul(e.field(op, RowArg.ROWS_FIELD), 8)), i64, 8)
        first, self.tile_rows, self.lane = locate(e, row, n_rows)
        self.base = e.at(out, e.mul(first, stride))

    def write(self, block: Reg, values: Sequence[Reg]) -> None:
        e = self.e
        if self.dtype == "f32":
            _store_columns(e, values, e.at(self.base, e.mul(block, 128)))
        elif self.dtype == "bf16":
            target = e.at(self.base, e.mul(block, 64))
            for v, value in enumerate(values):
                e.store(e.float_to_bfloat(value), e.at(target, 2 * e.L * v), 2)
        else:
            record = e.at(self.base, e.mul(e.mul(block, self.tile_rows), RECORD))
            store_block(e, values, record, self.tile_rows, self.lane)


def _parts(dtype: str, columns: Callable[[Emitter, Reg, Reg], Columns32]) -> Body:
    """A row op without reductions: task t is part t % N_PARTS of row t / N_PARTS, in blocks of 32 columns."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        n_parts = e.field(op, RowArg.N_PARTS)
        n_blocks = b.sdiv(e.field(op, RowArg.WIDTH), e.c(32))
        with e.loop(last, first) as task:
            row, part = b.sdiv(task, n_parts), b.srem(task, n_parts)
            writer = _RowWriter(e, op, step, row, dtype)
            read = columns(e, op, row)
            start = b.sdiv(b.mul(part, n_blocks), n_parts)
            end = b.sdiv(b.mul(e.add(part, 1), n_blocks), n_parts)
            with e.loop(end, start) as block:
                writer.write(block, read(e.mul(block, 128)))

    return body


def _row_of(e: Emitter, op: Reg, base: int, stride: int, row: Reg) -> Reg:
    return e.at(e.ptr(e.field(op, base)), e.mul(row, e.field(op, stride)))


def quantize_body(dtype: str) -> Body:
    def columns(e: Emitter, op: Reg, row: Reg) -> Columns32:
        x = _row_of(e, op, RowArg.X, RowArg.X_STRIDE, row)
        return lambda at: load_columns(e, e.at(x, at))

    return _parts(dtype, columns)


def gated_body(activation: str, dtype: str) -> Body:
    """activation(x) * y; gelu_tanh(x) is x * sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""

    def gate(e: Emitter, x: Reg, y: Reg) -> Reg:
        b = e.b
        z = x
        if activation == "gelu_tanh":
            cube = b.fmul(b.fmul(x, x), x)
            z = b.fmul(e.fma(cube, e.floats(0.044715), x), e.floats(1.5957691216057308))
        decay = e.exp(b.fsub(e.floats(0.0), e.fabs(z)))
        top = b.select(b.fcmp_ordered(">=", z, e.floats(0.0)), e.floats(1.0), decay)
        return b.fmul(b.fmul(x, b.fdiv(top, b.fadd(e.floats(1.0), decay))), y)

    def columns(e: Emitter, op: Reg, row: Reg) -> Columns32:
        x = _row_of(e, op, RowArg.X, RowArg.X_STRIDE, row)
        y = _row_of(e, op, RowArg.Y, RowArg.Y_STRIDE, row)
        return lambda at: [
            gate(e, a, b) for a, b in zip(load_columns(e, e.at(x, at)), load_columns(e, e.at(y, at)), strict=True)
        ]

    return _parts(dtype, columns)


def _flat(read: Callable[[Emitter, Reg, Reg, Reg], Callable[[Reg], Reg]]) -> Body:
    """A float row op over whole rows, a vector at a time; widths are multiples of 16."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        n_bytes = e.mul(e.field(op, RowArg.WIDTH), 4)
        with e.loop(last, first) as row:
            out = _row_of(e, op, RowArg.OUT, RowArg.OUT_STRIDE, row)
            value_at = read(e, op, step, row)
            with e.loop(n_bytes, 0, 4 * e.L) as at:
                e.store(value_at(at), e.at(out, at), 4)

    return body


def select_rows_body() -> Body:
    def read(e: Emitter, op: Reg, step: Reg, row: Reg) -> Callable[[Reg], Reg]:
        rows = e.ptr(e.field(step, StepField.OUTPUT_ROWS))
        source = e.b.sext(e.load(e.at(rows, e.mul(row, 4)), i32, 4), i64)
        x = _row_of(e, op, RowArg.X, RowArg.X_STRIDE, source)
        return lambda at: e.load(e.at(x, at), e.vf, 4)

    return _flat(read)


def add_body() -> Body:
    def read(e: Emitter, op: Reg, step: Reg, row: Reg) -> Callable[[Reg], Reg]:
        x = _row_of(e, op, RowArg.X, RowArg.X_STRIDE, row)
        y = _row_of(e, op, RowArg.Y, RowArg.Y_STRIDE, row)
        return lambda at: e.b.fadd(e.load(e.at(x, at), e.vf, 4), e.load(e.at(y, at), e.vf, 4))

    return _flat(read)


def rms_norm_body(dtype: str) -> Body:
    """A task is a row; each of its N_PARTS groups of WIDTH columns is normalized with the same weight."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        width, weight = e.field(op, RowArg.WIDTH), e.ptr(e.field(op, RowArg.Y))
        n_bytes = e.mul(width, 4)
        eps = e.load(e.at(op, 8 * RowArg.EPS), f32, 4)
        count = b.sitofp(width, f32)
        with e.loop(last, first) as row:
            x_row = _row_of(e, op, RowArg.X, RowArg.X_STRIDE, row)
            writer = _RowWriter(e, op, step, row, dtype)
            with e.loop(e.field(op, RowArg.N_PARTS)) as group:
                at_group = e.mul(group, n_bytes)
                x = e.at(x_row, at_group)
                squares = [e.var(e.floats(0.0)) for _ in range(16 // e.L)]
                with e.loop(n_bytes, 0, 64) as at:
                    for slot, value in zip(squares, load_columns(e, e.at(x, at), 16), strict=True):
                        e.set(slot, e.fma(value, value, e.get(slot)))
                total = e.get(squares[0])
                for slot in squares[1:]:
                    total = b.fadd(total, e.get(slot))
                mean = b.fdiv(e.reduce_add(total), count)
                root = e.call("llvm.sqrt.f32", f32, [b.fadd(mean, eps)])
                factor = e.splat(b.fdiv(f32(1.0), root))
                scaled = lambda at, n, x=x, factor=factor: [  # noqa: E731
                    b.fmul(b.fmul(v, factor), w)
                    for v, w in zip(load_columns(e, e.at(x, at), n), load_columns(e, e.at(weight, at), n), strict=True)
                ]
                if dtype == "f32":
                    target = e.at(writer.base, at_group)
                    with e.loop(n_bytes, 0, 64) as at:
                        _store_columns(e, scaled(at, 16), e.at(target, at))
                else:  # a rounded row is one group: heads are never rounded before they are rotated
                    with e.loop(b.sdiv(width, e.c(32))) as block:
                        writer.write(block, scaled(e.mul(block, 128), 32))

    return body
