"""The "a8" activation: int8 with a float32 scale for each 32 columns, interleaved for the matmul's token tiles.

M rows are cut into tiles of 8 and one each of 4, 2 and 1 for the rest. A tile of T rows starting at row m0 lies at
m0 * row_bytes; for each 32 columns it holds a record of 60 * T bytes:

    q i8[8 units][T][4] | d f32[T] | d * sum(q) f32[T] | d * sum over each half of 16 columns f32[2][T]
    | -sum(q) i32[T] | -sum over each half i32[2][T]

so that a unit of one row is a 4-byte broadcast, and a tile's place does not depend on how the others were cut. The float
sums are for weights with minimums, the integer ones for weights with an offset.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i8, i32, vector

RECORD = 60  # bytes for each row and 32 columns
TILES = (8, 4, 2, 1)


def row_bytes(width: int) -> int:
    return RECORD * (width // 32)


def scale_at(t: int) -> int:
    return 32 * t


def sum_at(t: int) -> int:
    return 36 * t


def half_sums_at(t: int) -> int:
    return 40 * t


def negative_sum_at(t: int) -> int:
    return 48 * t


def negative_half_sums_at(t: int) -> int:
    return 52 * t


def locate(e: Emitter, m: Reg, n_rows: Reg) -> tuple[Reg, Reg, Reg]:
    """(first row of the tile, rows in the tile, place in the tile) of row m of n_rows."""
    b = e.b
    full = b.and_(n_rows, e.c(-8))
    first, size = b.and_(m, e.c(-8)), e.c(8)
    lane = b.and_(m, e.c(7))
    in_rest = b.icmp_signed(">=", m, full)
    rest_first, rest_size, rest_lane = full, e.c(0), b.sub(m, full)
    found = b.icmp_signed("!=", full, full)
    for tile in TILES[1:]:
        present = b.and_(n_rows, e.c(tile))
        here = b.and_(b.icmp_signed("<", rest_lane, present), b.not_(found))
        rest_size = b.select(here, e.c(tile), rest_size)
        skip = b.select(b.or_(found, here), e.c(0), present)
        rest_first, rest_lane = b.add(rest_first, skip), b.sub(rest_lane, skip)
        found = b.or_(found, here)
    return (
        b.select(in_rest, rest_first, first),
        b.select(in_rest, rest_size, size),
        b.select(in_rest, rest_lane, lane),
    )


def store_block(e: Emitter, values: Sequence[Reg], record: Reg, tile_rows: Reg, lane: Reg) -> None:
    """Quantize 32 columns, given as vectors of `e.L` floats, into place `lane` of a tile's record."""
    b = e.b
    largest = e.fabs(values[0])
    for value in values[1:]:
        largest = e.fmax(largest, e.fabs(value))
    amax = e.reduce_max(largest)
    # below 1e-30 the reciprocal would overflow; such a block is zero for every purpose
    usable = b.fcmp_ordered(">", amax, f32(1e-30))
    scale = b.select(usable, b.fdiv(amax, f32(127.0)), f32(0.0))
    inverse = e.splat(b.select(usable, b.fdiv(f32(127.0), amax), f32(0.0)))
    codes = [e.round_to_int(b.fmul(value, inverse)) for value in values]
    at_lane = e.at(record, e.mul(lane, 4))
    row_step = e.mul(tile_rows, 4)
    for v, code in enumerate(codes):
        words = b.bitcast(b.trunc(code, vector(i8, e.L)), vector(i32, e.L // 4))
        for w in range(e.L // 4):
            unit = v * (e.L // 4) + w
            e.store(b.extract_element(words, i32(w)), e.at(at_lane, e.mul(row_step, unit)), 4)
    half = len(codes) // 2
    sums = []
    for part in (codes[:half], codes[half:]):
        total = part[0]
        for code in part[1:]:
            total = b.add(total, code)
        sums.append(e.reduce_add(total))
    sums.insert(0, b.add(sums[0], sums[1]))
    tail = e.at(at_lane, e.mul(tile_rows, 32))
    e.store(scale, tail, 4)
    for i, total in enumerate(sums, 1):
        e.store(b.fmul(scale, b.sitofp(total, f32)), e.at(tail, e.mul(row_step, i)), 4)
        e.store(b.neg(total), e.at(tail, e.mul(row_step, i + 3)), 4)
