"""Rows on their way to the experts and back: sorted by expert, gathered in that order, and added up for each token.

A pair is a token's row and one of its slots, number row * n_used + slot. Sorted by expert, and within one by number, pairs
have places; what is multiplied with one expert's weights lies in adjoining places, in the form that the matmul's tiles read.
"""

from __future__ import annotations

from enum import IntEnum

from pyinfer.kernels_cpu.activation_a8 import RECORD, locate
from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.opcode import OpField
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i32, i64, vector


class PlaceArg(IntEnum):
    """Operands of `place`, a single task. STARTS to EXPERTS_AT are int32 arrays that it fills."""

    EXPERTS = OpField.ARGS
    EXPERTS_STRIDE = OpField.ARGS + 1  # bytes
    N_EXPERTS = OpField.ARGS + 2
    N_USED = OpField.ARGS + 3
    ROWS_FIELD = OpField.ARGS + 4  # the StepField that counts rows
    STARTS = OpField.ARGS + 5  # [n_experts + 1] the place of each expert's first pair, and the number of pairs
    NEXT = OpField.ARGS + 6  # [n_experts] working memory
    PAIRS_AT = OpField.ARGS + 7  # [pairs] the pair in each place
    EXPERTS_AT = OpField.ARGS + 8  # [pairs] its expert


class GatherArg(IntEnum):
    """Operands of `gather`; a task is a place."""

    X = OpField.ARGS
    X_STRIDE = OpField.ARGS + 1  # bytes; of an "a8" value: its row bytes
    SLOT_BYTES = OpField.ARGS + 2  # of a row that go to one slot; 0: all slots get all of it
    OUT = OpField.ARGS + 3
    OUT_STRIDE = OpField.ARGS + 4  # the bytes of one pair's row
    N_USED = OpField.ARGS + 5
    ROWS_FIELD = OpField.ARGS + 6
    STARTS = OpField.ARGS + 7
    PAIRS_AT = OpField.ARGS + 8
    EXPERTS_AT = OpField.ARGS + 9


class CombineArg(IntEnum):
    """Operands of `combine`; row r is cut into N_PARTS tasks. Strides in bytes."""

    X = OpField.ARGS
    X_STRIDE = OpField.ARGS + 1
    WEIGHTS = OpField.ARGS + 2
    WEIGHTS_STRIDE = OpField.ARGS + 3
    RESIDUAL = OpField.ARGS + 4  # address or 0
    RESIDUAL_STRIDE = OpField.ARGS + 5
    OUT = OpField.ARGS + 6
    OUT_STRIDE = OpField.ARGS + 7
    WIDTH = OpField.ARGS + 8  # columns of a slot
    N_USED = OpField.ARGS + 9
    N_PARTS = OpField.ARGS + 10


def load_int(e: Emitter, array: Reg, index: Reg) -> Reg:
    """Element `index` of an int32 array, as int64."""
    return e.b.sext(e.load(e.at(array, e.mul(index, 4)), i32, 4), i64)


def _store_int(e: Emitter, value: Reg, array: Reg, index: Reg) -> None:
    e.store(e.b.trunc(value, i32), e.at(array, e.mul(index, 4)), 4)


def n_rows_of(e: Emitter, op: Reg, step: Reg, field: int) -> Reg:
    return e.load(e.at(step, e.mul(e.field(op, field), 8)), i64, 8)


def place_body() -> Body:
    """A counting sort: stable, so that a pair's place depends on the batch alone."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        n_rows, n_used = n_rows_of(e, op, step, PlaceArg.ROWS_FIELD), e.field(op, PlaceArg.N_USED)
        n_experts = e.field(op, PlaceArg.N_EXPERTS)
        experts, stride = e.ptr(e.field(op, PlaceArg.EXPERTS)), e.field(op, PlaceArg.EXPERTS_STRIDE)
        starts, following, pairs_at, experts_at = (
            e.ptr(e.field(op, field))
            for field in (PlaceArg.STARTS, PlaceArg.NEXT, PlaceArg.PAIRS_AT, PlaceArg.EXPERTS_AT)
        )
        with e.loop(e.add(n_experts, 1)) as expert:
            _store_int(e, e.c(0), starts, expert)
        with e.loop(n_rows) as row, e.loop(n_used) as s:
            after = e.add(load_int(e, e.at(experts, e.mul(row, stride)), s), 1)
            _store_int(e, e.add(load_int(e, starts, after), 1), starts, after)
        with e.loop(n_experts) as expert:
            start, after = load_int(e, starts, expert), e.add(expert, 1)
            _store_int(e, start, following, expert)
            _store_int(e, e.add(load_int(e, starts, after), start), starts, after)
        with e.loop(n_rows) as row, e.loop(n_used) as s:
            expert = load_int(e, e.at(experts, e.mul(row, stride)), s)
            place = load_int(e, following, expert)
            _store_int(e, e.add(place, 1), following, expert)
            _store_int(e, e.add(e.mul(row, n_used), s), pairs_at, place)
            _store_int(e, expert, experts_at, place)

    return body


def gather_body(dtype: str) -> Body:
    """out[place] = what the pair there is multiplied with. "a8" rows are in tiles, cut anew for each expert's rows."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        n_used, pairs_at = e.field(op, GatherArg.N_USED), e.ptr(e.field(op, GatherArg.PAIRS_AT))
        copy = _copy_a8 if dtype == "a8" else _copy_floats
        with e.loop(last, first) as place:
            pair = load_int(e, pairs_at, place)
            copy(e, op, step, place, e.b.sdiv(pair, n_used), e.b.srem(pair, n_used))

    return body


def _copy_floats(e: Emitter, op: Reg, step: Reg, place: Reg, row: Reg, slot: Reg) -> None:
    out_stride = e.field(op, GatherArg.OUT_STRIDE)
    from_row = e.at(e.ptr(e.field(op, GatherArg.X)), e.mul(row, e.field(op, GatherArg.X_STRIDE)))
    source = e.at(from_row, e.mul(slot, e.field(op, GatherArg.SLOT_BYTES)))
    target = e.at(e.ptr(e.field(op, GatherArg.OUT)), e.mul(place, out_stride))
    with e.loop(out_stride, 0, 64) as at:
        e.store(e.load(e.at(source, at), vector(i32, 16)), e.at(target, at))


def _copy_a8(e: Emitter, op: Reg, step: Reg, place: Reg, row: Reg, slot: Reg) -> None:
    """From a tile of the step's rows into one of the expert's rows."""
    b = e.b
    starts, experts_at = (e.ptr(e.field(op, field)) for field in (GatherArg.STARTS, GatherArg.EXPERTS_AT))
    expert = load_int(e, experts_at, place)
    start, end = load_int(e, starts, expert), load_int(e, starts, e.add(expert, 1))
    from_row, from_size, from_lane = locate(e, row, n_rows_of(e, op, step, GatherArg.ROWS_FIELD))
    to_row, to_size, to_lane = locate(e, b.sub(place, start), b.sub(end, start))
    stride, out_stride = e.field(op, GatherArg.X_STRIDE), e.field(op, GatherArg.OUT_STRIDE)
    from_slot = b.mul(b.mul(slot, e.field(op, GatherArg.SLOT_BYTES)), from_size)
    source = e.at(
        e.ptr(e.field(op, GatherArg.X)), b.add(b.add(b.mul(from_row, stride), from_slot), e.mul(from_lane, 4))
    )
    to_place = b.mul(b.add(start, to_row), out_stride)
    target = e.at(e.ptr(e.field(op, GatherArg.OUT)), b.add(to_place, e.mul(to_lane, 4)))
    from_step, to_step = e.mul(from_size, 4), e.mul(to_size, 4)
    with e.loop(out_stride, 0, RECORD) as at:
        from_block, to_block = e.at(source, b.mul(at, from_size)), e.at(target, b.mul(at, to_size))
        for word in range(RECORD // 4):
            value = e.load(e.at(from_block, e.mul(from_step, word)), i32, 4)
            e.store(value, e.at(to_block, e.mul(to_step, word)), 4)


def combine_body() -> Body:
    """out = residual + the sum over slots, in ascending order, of weight * slot."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        n_parts, n_used = e.field(op, CombineArg.N_PARTS), e.field(op, CombineArg.N_USED)
        width = e.field(op, CombineArg.WIDTH)
        n_units, slot_bytes = b.sdiv(width, e.c(16)), e.mul(width, 4)
        residual = e.field(op, CombineArg.RESIDUAL)
        has_residual = b.icmp_signed("!=", residual, e.c(0))
        with e.loop(last, first) as task:
            row, part = b.sdiv(task, n_parts), b.srem(task, n_parts)
            x, weights, out = (
                e.at(e.ptr(e.field(op, base)), e.mul(row, e.field(op, base + 1)))
                for base in (CombineArg.X, CombineArg.WEIGHTS, CombineArg.OUT)
            )
            from_residual = b.add(residual, e.mul(row, e.field(op, CombineArg.RESIDUAL_STRIDE)))
            start, end = (b.sdiv(b.mul(p, n_units), n_parts) for p in (part, e.add(part, 1)))
            with e.loop(end, start) as unit:
                at = e.mul(unit, 64)
                sums = [e.var(e.floats(0.0)) for _ in range(16 // e.L)]
                with e.when(has_residual):
                    for v, total in enumerate(sums):
                        e.set(total, e.load(e.at(e.ptr(b.add(from_residual, at)), 4 * e.L * v), e.vf, 4))
                with e.loop(n_used) as s:
                    weight = e.splat(e.load(e.at(weights, e.mul(s, 4)), f32, 4))
                    values = e.at(e.at(x, e.mul(s, slot_bytes)), at)
                    for v, total in enumerate(sums):
                        e.set(total, e.fma(weight, e.load(e.at(values, 4 * e.L * v), e.vf, 4), e.get(total)))
                for v, total in enumerate(sums):
                    e.store(e.get(total), e.at(e.at(out, at), 4 * e.L * v), 4)

    return body
