"""The integer matmul of the block types: "a8" activations times repacked weights, dequantized in registers.

out[m, n] = sum over 32 columns of d_x * (sum over sub-blocks of d_w * scale * (dot - offset * sum_x) - minimum * sum_x),
the inner part of it in exact integers, one float accumulator for each output, columns in ascending order, whether 1 row or 8
are computed at a time: a row's result never depends on its batch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from pyinfer.kernels_cpu.activation_a8 import (
    RECORD,
    TILES,
    half_sums_at,
    negative_half_sums_at,
    negative_sum_at,
    scale_at,
    sum_at,
)
from pyinfer.kernels_cpu.compiler import Body, define
from pyinfer.kernels_cpu.opcode import OpField
from pyinfer.kernels_cpu.repack import plane_offset
from pyinfer.kernels_cpu.simd import Emitter, Reg, i8, i64, vector
from pyinfer.kernels_cpu.weight_format import PLANES, ROWS, BlockSource, WeightFormat


class MatMulArg(IntEnum):
    """Operands of every matmul; a task is a group of 16 weight rows, over all activation rows."""

    WEIGHTS = OpField.ARGS
    GROUP_BYTES = OpField.ARGS + 1
    N_RECORDS = OpField.ARGS + 2  # of a row group; for float weights the columns
    X = OpField.ARGS + 3
    X_ROW_BYTES = OpField.ARGS + 4
    OUT = OpField.ARGS + 5
    OUT_STRIDE = OpField.ARGS + 6  # bytes
    BIAS = OpField.ARGS + 7  # address or 0
    RESIDUAL = OpField.ARGS + 8  # address or 0
    RESIDUAL_STRIDE = OpField.ARGS + 9  # bytes
    ROWS_FIELD = OpField.ARGS + 10  # the StepField that counts activation rows
    ROW_BLOCK = OpField.ARGS + 11  # activation rows (a multiple of 8) that stay in cache while weight groups pass


ROW_BLOCK_BYTES = 512 << 10  # of activations that stay in L2 while weight groups pass by
N_TILE_ARGS = 9  # records, weights, x, x row bytes, out, out stride, bias, residual, residual stride


def define_tiles(e: Emitter, emit_tile: Any, name: str) -> dict[int, Any]:
    """A function for each number of activation rows, made by `emit_tile(e, rows, args)`, in the module of `e`."""
    tiles = {}
    for rows in TILES:
        tile_e, fn = define(e.b.module, f"{name}_tile{rows}", e.isa, N_TILE_ARGS, internal=True)
        emit_tile(tile_e, rows, fn.args)
        tile_e.b.ret_void()
        tiles[rows] = fn
    return tiles


def matmul_body(emit_tile: Any, name: str) -> Body:
    """Loops over row blocks, weight groups and token tiles around `emit_tile(e, rows, args)`."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        tiles = define_tiles(e, emit_tile, name)
        weights, group_bytes = e.field(op, MatMulArg.WEIGHTS), e.field(op, MatMulArg.GROUP_BYTES)
        n_records, x, x_row = (e.field(op, i) for i in (MatMulArg.N_RECORDS, MatMulArg.X, MatMulArg.X_ROW_BYTES))
        out, out_stride = e.field(op, MatMulArg.OUT), e.field(op, MatMulArg.OUT_STRIDE)
        bias, residual = e.field(op, MatMulArg.BIAS), e.field(op, MatMulArg.RESIDUAL)
        residual_stride, row_block = e.field(op, MatMulArg.RESIDUAL_STRIDE), e.field(op, MatMulArg.ROW_BLOCK)
        n_rows = e.load(e.at(step, e.mul(e.field(op, MatMulArg.ROWS_FIELD), 8)), i64, 8)
        has_bias, has_residual = (b.icmp_signed("!=", v, e.c(0)) for v in (bias, residual))

        def call(rows: int, group: Reg, m: Reg) -> None:
            at_group = e.mul(group, 4 * ROWS)
            place = lambda base, stride: b.add(b.add(base, e.mul(m, stride)), at_group)  # noqa: E731
            b.call(
                tiles[rows],
                [
                    n_records,
                    b.add(weights, e.mul(group, group_bytes)),
                    b.add(x, e.mul(m, x_row)),
                    x_row,
                    place(out, out_stride),
                    out_stride,
                    b.select(has_bias, b.add(bias, at_group), e.c(0)),
                    b.select(has_residual, place(residual, residual_stride), e.c(0)),
                    residual_stride,
                ],
            )

        with e.loop(n_rows, 0, row_block) as block:
            end = e.min(b.add(block, row_block), n_rows)
            full = b.add(block, b.and_(b.sub(end, block), e.c(-8)))
            with e.loop(last, first) as group:
                with e.loop(full, block, 8) as m:
                    call(8, group, m)
                at = full
                rest = b.sub(end, full)
                for rows in TILES[1:]:
                    some = b.and_(rest, e.c(rows))
                    with e.when(b.icmp_signed("!=", some, e.c(0))):
                        call(rows, group, at)
                    at = b.add(at, some)

    return body


def finish_tile(e: Emitter, sums: list[list[Reg]], args: Any) -> None:
    """Add bias and residual to [rows][vectors] sums and store them."""
    b = e.b
    out, out_stride, bias, residual, residual_stride = args
    slots = [[e.var(value) for value in row] for row in sums]
    for source, stride in ((bias, None), (residual, residual_stride)):
        with e.when(b.icmp_signed("!=", source, e.c(0))):
            for t, row in enumerate(slots):
                base = e.ptr(source if stride is None else b.add(source, e.mul(stride, t)))
                for v, slot in enumerate(row):
                    e.set(slot, b.fadd(e.get(slot), e.load(e.at(base, 4 * e.L * v), e.vf, 4)))
    for t, row in enumerate(slots):
        target = e.ptr(b.add(out, e.mul(out_stride, t)))
        for v, slot in enumerate(row):
            e.store(e.get(slot), e.at(target, 4 * e.L * v), 4)


def emit_block_tile(source: BlockSource) -> Any:
    fmt = source.format

    def emit(e: Emitter, rows: int, args: Any) -> None:
        n_records, weights, x, _, *rest = args
        vectors = ROWS // e.L
        sums = [[e.var(e.floats(0.0)) for _ in range(vectors)] for _ in range(rows)]
        w0, x0 = e.ptr(weights), e.ptr(x)
        per_record = fmt.columns // 32
        with e.loop(n_records) as r:
            record = e.at(w0, e.mul(r, fmt.record_bytes))
            x_record = e.at(x0, e.mul(r, per_record * RECORD * rows))
            d = [e.load_halves(e.at(record, 2 * e.L * v)) for v in range(vectors)]
            dm = [e.load_halves(e.at(record, 32 + 2 * e.L * v)) for v in range(vectors)] if source.dm_at else None
            if per_record == 1:
                _block32(e, fmt, rows, record, x_record, 0, d, dm, sums)
            else:
                with e.loop(per_record) as j:
                    _block32(e, fmt, rows, record, e.at(x_record, e.mul(j, RECORD * rows)), j, d, dm, sums)
        finish_tile(e, [[e.get(slot) for slot in row] for row in sums], rest)

    return emit


def _block32(
    e: Emitter, fmt: WeightFormat, rows: int, record: Reg, x: Reg, j: Any, d: list[Reg], dm: Any, sums: list[list[Reg]]
) -> None:
    """Add 32 columns (block j of the record) of `rows` activations times 16 weight rows to `sums`."""
    b = e.b
    at_j = (lambda n: j * n) if isinstance(j, int) else (lambda n: e.mul(j, n))
    payload = e.at(e.at(record, fmt.payload_at), at_j(fmt.bits * 64))
    if e.isa.prefetch and fmt.bits < 8:  # whole bytes go by so fast that the hardware's prefetcher does better alone
        lines = -(-fmt.record_bytes // (64 * (fmt.columns // 32)))
        ahead = e.at(e.at(record, e.isa.prefetch), at_j(64 * lines))
        for i in range(lines):
            e.prefetch(e.at(ahead, 64 * i))
    per_32 = 32 // fmt.sub_block
    units = 8 // per_32
    offset = e.signed_offset(fmt.offset)
    shift = offset.bit_length() - 1
    assert offset == 0 or offset == 1 << shift
    for v in range(len(d)):
        unit = _UnitReader(e, fmt, payload, v)
        dots: list[Reg] = []  # of each row, with the weights' scales
        for s in range(per_32):
            acc = [e.ints(0)] * rows
            if offset:
                at = negative_sum_at(rows) if per_32 == 1 else negative_half_sums_at(rows) + s * 4 * rows
                acc = [b.shl(e.splat_int(e.at(x, at + 4 * t)), e.ints(shift)) for t in range(rows)]
            for u in range(s * units, (s + 1) * units):
                code = unit.read(u)
                for t in range(rows):
                    acc[t] = e.dot4(acc[t], code, e.splat_int(e.at(x, (u * rows + t) * 4)), (1 << fmt.bits) - 1)
            scale, negative_minimum = _scales(e, fmt, record, at_j, s, per_32, v, d[v], dm[v] if dm else None)
            floats = [e.to_float(total) for total in acc]
            if s == 0:
                dots = [b.fmul(f, scale) for f in floats]
            else:
                dots = [e.fma(f, scale, dot) for f, dot in zip(floats, dots, strict=True)]
            if negative_minimum is not None:
                at = sum_at(rows) if per_32 == 1 else half_sums_at(rows) + s * 4 * rows
                for t in range(rows):
                    slot = sums[t][v]
                    e.set(slot, e.fma(negative_minimum, e.splat_float(e.at(x, at + 4 * t)), e.get(slot)))
        for t in range(rows):
            e.set(sums[t][v], e.fma(dots[t], e.splat_float(e.at(x, scale_at(rows) + 4 * t)), e.get(sums[t][v])))


def _scales(
    e: Emitter, fmt: WeightFormat, record: Reg, at_j: Any, s: int, per_32: int, v: int, d: Reg, dm: Reg
) -> tuple[Reg, Reg | None]:
    """(d * scale, minus the minimum or None) of one sub-block for the 16 rows' vector v."""
    b = e.b
    scale, minimum = d, dm
    if fmt.n_scales:
        here = e.at(e.at(record, fmt.scales_at + s * ROWS + v * e.L), at_j(per_32 * ROWS))
        raw = e.load(here, vector(i8, e.L))
        if fmt.scales == "i8":
            scale = b.fmul(d, e.to_float(b.sext(raw, e.vi)))
        else:
            pair = b.zext(raw, e.vi)
            low, high = b.and_(pair, e.ints(15)), b.lshr(pair, e.ints(4))
            if fmt.scales == "u6u6":
                more = _high_bits(e, fmt, record, at_j, v)
                low = b.or_(low, b.and_(b.shl(more, e.ints(4)), e.ints(0x30)))
                high = b.or_(high, b.and_(b.shl(more, e.ints(2)), e.ints(0x30)))
            scale = b.fmul(d, e.to_float(low))
            minimum = b.fmul(b.fsub(e.floats(0.0), dm), e.to_float(high))
    return scale, minimum


def _high_bits(e: Emitter, fmt: WeightFormat, record: Reg, at_j: Any, v: int) -> Reg:
    """Sub-block j's high bits of scale (0, 1) and minimum (2, 3), one row a lane; those of an odd j lie above an even one's."""
    b = e.b
    j = at_j(1)
    odd = b.and_(j, e.c(1))
    byte = e.at(e.at(record, fmt.high_bits_at + v * e.L), e.mul(b.lshr(j, e.c(1)), ROWS))
    shift = e.splat(b.trunc(e.mul(odd, 4), e.vi.element))
    return b.lshr(b.zext(e.load(byte, vector(i8, e.L)), e.vi), shift)


class _UnitReader:
    """Reads a 32-column payload unit by unit, each vector loaded once."""

    def __init__(self, e: Emitter, fmt: WeightFormat, payload: Reg, v: int) -> None:
        self.e, self.fmt, self.payload, self.v = e, fmt, payload, v
        self.loaded: dict[tuple[int, int], Reg] = {}

    def _vector(self, plane: int, index: int) -> Reg:
        key = (plane, index)
        if key not in self.loaded:
            at = plane_offset(self.fmt, plane, index) + self.v * 4 * self.e.L
            self.loaded[key] = self.e.load(self.e.at(self.payload, at), self.e.vi)
        return self.loaded[key]

    def _bits(self, plane: int, width: int, unit: int, to_bit: int) -> Reg:
        """The unit's bits of one plane, moved to `to_bit` of every byte."""
        e, b = self.e, self.e.b
        index, place = divmod(unit, 8 // width)
        value = self._vector(plane, index)
        if width == 8:
            return value
        shift = place * width - to_bit
        if shift > 0:
            value = b.lshr(value, e.ints(shift))
        elif shift < 0:
            value = b.shl(value, e.ints(-shift))
        return b.and_(value, e.ints(((1 << width) - 1 << to_bit) * 0x01010101))

    def read(self, unit: int) -> Reg:
        planes = PLANES[self.fmt.bits]
        low = self._bits(len(planes) - 1, planes[-1], unit, 0)
        return low if len(planes) == 1 else self.e.b.or_(low, self._bits(0, planes[0], unit, planes[1]))
