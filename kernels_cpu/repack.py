"""Kernels that read GGUF blocks: repacking rows for the matmul, and plain dequantization for embedding rows."""

from __future__ import annotations

from enum import IntEnum

from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.opcode import OpField, StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i8, i32, vector
from pyinfer.kernels_cpu.weight_format import (
    PLANES,
    ROWS,
    BlockSource,
    WeightFormat,
    half_scalar,
    load_half_bits,
    low_bits,
    shift_left,
    shift_right,
)


class RepackArg(IntEnum):
    """Operands of `repack`; a task is a group of 16 rows."""

    SOURCE = OpField.ARGS
    ROW_BYTES = OpField.ARGS + 1
    N_ROWS = OpField.ARGS + 2
    TARGET = OpField.ARGS + 3  # zeroed memory
    N_RECORDS = OpField.ARGS + 4  # a row; for float types the columns


class EmbedArg(IntEnum):
    """Operands of `embed`; a task is a token."""

    TABLE = OpField.ARGS
    ROW_BYTES = OpField.ARGS + 1
    OUT = OpField.ARGS + 2
    OUT_STRIDE = OpField.ARGS + 3  # bytes
    N_BLOCKS = OpField.ARGS + 4  # a row; for float types the columns / 16
    SCALE = OpField.ARGS + 5  # float32 bits


def plane_offset(fmt: WeightFormat, plane: int, v: int) -> int:
    """Byte offset in a 32-column payload of vector v of a plane (0 = narrow when there are two)."""
    planes = PLANES[fmt.bits]
    if len(planes) == 1:
        return 64 * v
    ratio = planes[1] // planes[0]
    return 64 * (v * (1 + ratio) if plane == 0 else v // ratio * (1 + ratio) + 1 + v % ratio)


def _pack_planes(e: Emitter, fmt: WeightFormat, codes: Reg) -> list[tuple[int, Reg]]:
    """(byte offset of the vector in the payload, the row's dword for it) of 32 codes of one row."""
    planes = PLANES[fmt.bits]
    low_width = planes[-1]
    out = []
    for plane, width in enumerate(planes):
        from_bit = low_width if len(planes) == 2 and plane == 0 else 0
        part = shift_right(e, codes, from_bit) if width == 8 else low_bits(e, shift_right(e, codes, from_bit), width)
        per_vector = 8 // width
        packed = None
        for k in range(per_vector):
            columns = [4 * (v * per_vector + k) + j for v in range(width) for j in range(4)]
            piece = shift_left(e, e.shuffle(part, columns), k * width)
            packed = piece if packed is None else e.b.or_(packed, piece)
        words = e.b.bitcast(packed, vector(i32, width))
        out += [(plane_offset(fmt, plane, v), e.b.extract_element(words, i32(v))) for v in range(width)]
    return out


def repack_body(source: BlockSource) -> Body:
    fmt = source.format

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        n_records, row_bytes = e.field(op, RepackArg.N_RECORDS), e.field(op, RepackArg.ROW_BYTES)
        n_rows = e.field(op, RepackArg.N_ROWS)
        src, dst = e.ptr(e.field(op, RepackArg.SOURCE)), e.ptr(e.field(op, RepackArg.TARGET))
        with e.loop(last, first) as group:
            rows_here = e.min(e.sub(n_rows, e.mul(group, ROWS)), ROWS)
            group_dst = e.at(dst, e.mul(e.mul(group, n_records), fmt.record_bytes))
            with e.loop(n_records) as r:
                record = e.at(group_dst, e.mul(r, fmt.record_bytes))
                with e.loop(rows_here) as row:
                    at = e.add(e.mul(e.add(e.mul(group, ROWS), row), row_bytes), e.mul(r, fmt.block_bytes))
                    _repack_block(e, source, e.at(src, at), record, row)

    return body


def _repack_block(e: Emitter, source: BlockSource, block: Reg, record: Reg, row: Reg) -> None:
    fmt = source.format
    e.store(load_half_bits(e, block, source.d_at), e.at(record, e.mul(row, 2)), 1)
    if source.dm_at is not None:
        e.store(load_half_bits(e, block, source.dm_at), e.at(e.at(record, 32), e.mul(row, 2)), 1)
    byte_row = e.at(record, row)
    for k in range(fmt.n_scales):
        e.store(_scale_byte(e, source, block, k), e.at(byte_row, fmt.scales_at + k * ROWS))
    for k in range(0, fmt.n_scales if fmt.scales == "u6u6" else 0, 2):
        parts = [read(e, block, i) for i in (k, k + 1) for read in (source.scale, source.minimum)]
        high = e.b.lshr(parts[0], i8(4))
        for i, part in enumerate(parts[1:], start=1):
            high = e.b.or_(high, e.b.shl(e.b.lshr(part, i8(4)), i8(2 * i)))
        e.store(high, e.at(byte_row, fmt.high_bits_at + k // 2 * ROWS))
    dword_row = e.at(record, e.mul(row, 4))
    for j in range(fmt.columns // 32):
        for offset, word in _pack_planes(e, fmt, source.codes(e, block, j)):
            e.store(word, e.at(dword_row, fmt.payload_at + j * fmt.bits * 64 + offset), 4)


def _scale_byte(e: Emitter, source: BlockSource, block: Reg, k: int) -> Reg:
    """Sub-block k's byte: the scale, or the low four bits of scale and minimum."""
    scale = source.scale(e, block, k)
    if source.format.scales == "i8":
        return scale
    return e.b.or_(e.b.and_(scale, i8(15)), e.b.shl(source.minimum(e, block, k), i8(4)))


def embed_body(source: BlockSource) -> Body:
    fmt = source.format

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        table, out = e.ptr(e.field(op, EmbedArg.TABLE)), e.ptr(e.field(op, EmbedArg.OUT))
        row_bytes, stride = e.field(op, EmbedArg.ROW_BYTES), e.field(op, EmbedArg.OUT_STRIDE)
        ids = e.ptr(e.field(step, StepField.TOKEN_IDS))
        factor = e.load(e.at(op, 8 * EmbedArg.SCALE), f32, 4)
        with e.loop(last, first) as m:
            token = b.sext(e.load(e.at(ids, e.mul(m, 4)), i32, 4), e.c(0).type)
            row, target = e.at(table, e.mul(token, row_bytes)), e.at(out, e.mul(m, stride))
            with e.loop(e.field(op, EmbedArg.N_BLOCKS)) as r:
                block = e.at(row, e.mul(r, fmt.block_bytes))
                _dequantize_block(e, source, block, e.at(target, e.mul(r, 4 * fmt.columns)), factor)

    return body


def _dequantize_block(e: Emitter, source: BlockSource, block: Reg, target: Reg, factor: Reg) -> None:
    fmt, b = source.format, e.b
    d = half_scalar(e, block, source.d_at)
    dm = half_scalar(e, block, source.dm_at) if source.dm_at is not None else None
    for j in range(fmt.columns // 32):
        codes = source.codes(e, block, j)
        for part in range(0, 32, 16):
            wide = e.to_float(b.zext(e.shuffle(codes, range(part, part + 16)), vector(i32, 16)))
            scale, low = d, dm
            if fmt.n_scales:
                k = (32 * j + part) // fmt.sub_block
                extend = b.sext if fmt.scales == "i8" else b.zext
                scale = b.fmul(d, b.sitofp(extend(source.scale(e, block, k), i32), f32))
                if dm is not None:
                    low = b.fmul(dm, b.sitofp(b.zext(source.minimum(e, block, k), i32), f32))
            if fmt.offset:
                wide = b.fsub(wide, e.const(f32, [float(fmt.offset)] * 16))
            value = b.fmul(wide, e.splat(scale, 16))
            if low is not None:
                combine = b.fadd if fmt.minimum == "dm" else b.fsub
                value = combine(value, e.splat(low, 16))
            e.store(b.fmul(value, e.splat(factor, 16)), e.at(target, 4 * (32 * j + part)), 4)
