"""Which experts a row goes to: the softmax over all of them, and the largest in descending order.

The choice is made by logit, which is the order of the probabilities; so nothing but the result has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from pyinfer.graph.expert_math import SMALLEST_SUM
from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.opcode import OpField
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i32

_NONE = 2**31 - 1  # the number of no expert
_INFINITY = float("inf")


class RouteArg(IntEnum):
    """Operands of `route`; a task is a row. Strides in bytes."""

    LOGITS = OpField.ARGS
    LOGITS_STRIDE = OpField.ARGS + 1
    N_EXPERTS = OpField.ARGS + 2
    EXPERTS = OpField.ARGS + 3
    EXPERTS_STRIDE = OpField.ARGS + 4
    WEIGHTS = OpField.ARGS + 5
    WEIGHTS_STRIDE = OpField.ARGS + 6
    N_USED = OpField.ARGS + 7
    NORMALIZE = OpField.ARGS + 8  # 0 or 1
    SCALE = OpField.ARGS + 9  # float32 bits


def route_body(scoring: str) -> Body:
    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        n_used = e.field(op, RouteArg.N_USED)
        normalize = b.icmp_signed("!=", e.field(op, RouteArg.NORMALIZE), e.c(0))
        scale = e.load(e.at(op, 8 * RouteArg.SCALE), f32, 4)
        with e.loop(last, first) as row:
            place = lambda base, row=row: e.at(e.ptr(e.field(op, base)), e.mul(row, e.field(op, base + 1)))  # noqa: E731
            logits = _Logits(e, place(RouteArg.LOGITS), e.field(op, RouteArg.N_EXPERTS))
            experts, weights = place(RouteArg.EXPERTS), place(RouteArg.WEIGHTS)
            score = _softmax_of(e, logits) if scoring == "softmax" else lambda v: _sigmoid(e, v)
            value, index = e.var(f32(_INFINITY)), e.var(i32(-1))
            chosen = e.var(f32(0.0))
            with e.loop(n_used) as s:
                next_value, next_index = logits.after(e.get(value), e.get(index))
                e.set(value, next_value)
                e.set(index, next_index)
                weight = score(next_value)
                e.set(chosen, b.fadd(e.get(chosen), weight))
                e.store(next_index, e.at(experts, e.mul(s, 4)), 4)
                e.store(weight, e.at(weights, e.mul(s, 4)), 4)
            enough = b.fcmp_ordered(">", e.get(chosen), f32(SMALLEST_SUM))
            divisor = b.select(normalize, b.select(enough, e.get(chosen), f32(SMALLEST_SUM)), f32(1.0))
            with e.loop(n_used) as s:
                at = e.at(weights, e.mul(s, 4))
                e.store(b.fmul(b.fdiv(e.load(at, f32, 4), divisor), scale), at, 4)

    return body


class _Logits:
    """One row; columns from `n` to the next multiple of 16 are there, with anything in them."""

    def __init__(self, e: Emitter, pointer: Reg, n: Reg) -> None:
        self.e, self.pointer, self.n = e, pointer, n

    def _each(self) -> Any:
        return self.e.loop(self.n, 0, self.e.L)

    def _vector(self, column: Reg) -> tuple[Reg, Reg, Reg]:
        """(values, expert numbers, which of them are experts) from this column on."""
        e = self.e
        numbers = e.b.add(e.splat(e.b.trunc(column, i32)), e.lane_index())
        exists = e.b.icmp_signed("<", numbers, e.splat(e.b.trunc(self.n, i32)))
        return e.load(e.at(self.pointer, e.mul(column, 4)), e.vf, 4), numbers, exists

    def largest(self) -> Reg:
        e = self.e
        best = e.var(e.floats(-_INFINITY))
        with self._each() as column:
            values, _, exists = self._vector(column)
            e.set(best, e.fmax(e.b.select(exists, values, e.floats(-_INFINITY)), e.get(best)))
        return e.reduce_max(e.get(best))

    def sum_of_exp(self, largest: Reg) -> Reg:
        e = self.e
        total = e.var(e.floats(0.0))
        with self._each() as column:
            values, _, exists = self._vector(column)
            powers = e.exp(e.b.fsub(values, e.splat(largest)))
            e.set(total, e.b.fadd(e.get(total), e.b.select(exists, powers, e.floats(0.0))))
        return e.reduce_add(e.get(total))

    def after(self, value: Reg, index: Reg) -> tuple[Reg, Reg]:
        """(value, number) of what comes after this one: the largest below it, or an equal one of a higher number.

        Where nothing does, because of NaNs, the last expert: what is read as a number must be one.
        """
        e, b = self.e, self.e.b
        best, best_at = e.var(e.floats(-_INFINITY)), e.var(e.ints(_NONE))
        before, before_at = e.splat(value), e.splat(index)
        with self._each() as column:
            values, numbers, exists = self._vector(column)
            equal = b.and_(b.fcmp_ordered("==", values, before), b.icmp_signed(">", numbers, before_at))
            follows = b.and_(exists, b.or_(b.fcmp_ordered("<", values, before), equal))
            none_yet = b.icmp_signed("==", e.get(best_at), e.ints(_NONE))
            better = b.and_(follows, b.or_(b.fcmp_ordered(">", values, e.get(best)), none_yet))
            e.set(best, b.select(better, values, e.get(best)))
            e.set(best_at, b.select(better, numbers, e.get(best_at)))
        found = e.reduce_max(e.get(best))
        winners = b.select(b.fcmp_ordered("==", e.get(best), e.splat(found)), e.get(best_at), e.ints(_NONE))
        number = e.reduce_min(winners)
        highest = b.trunc(e.sub(self.n, 1), i32)
        return found, b.select(b.icmp_signed("<", number, highest), number, highest)


def _softmax_of(e: Emitter, logits: _Logits) -> Callable[[Reg], Reg]:
    """From a logit of the row to its probability."""
    largest = logits.largest()
    total = logits.sum_of_exp(largest)
    return lambda v: e.b.fdiv(_exp(e, e.b.fsub(v, largest)), total)


def _exp(e: Emitter, x: Reg) -> Reg:
    """e^x of a scalar <= 0."""
    return e.b.extract_element(e.exp(e.splat(x)), i32(0))


def _sigmoid(e: Emitter, x: Reg) -> Reg:
    b = e.b
    is_negative = b.fcmp_ordered("<", x, f32(0.0))
    decay = _exp(e, b.select(is_negative, x, b.fsub(f32(0.0), x)))
    return b.fdiv(b.select(is_negative, decay, f32(1.0)), b.fadd(f32(1.0), decay))
