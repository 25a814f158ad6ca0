"""Which experts a row goes to: a score of each, the softmax over all or the sigmoid, and the largest in descending order."""

from __future__ import annotations

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
            scores = _Scores(e, place(RouteArg.LOGITS), e.field(op, RouteArg.N_EXPERTS), scoring)
            experts, weights = place(RouteArg.EXPERTS), place(RouteArg.WEIGHTS)
            score, index = e.var(f32(_INFINITY)), e.var(i32(-1))
            chosen = e.var(f32(0.0))
            with e.loop(n_used) as s:
                next_score, next_index = scores.after(e.get(score), e.get(index))
                e.set(score, next_score)
                e.set(index, next_index)
                e.set(chosen, b.fadd(e.get(chosen), next_score))
                e.store(next_index, e.at(experts, e.mul(s, 4)), 4)
                e.store(next_score, e.at(weights, e.mul(s, 4)), 4)
            enough = b.fcmp_ordered(">", e.get(chosen), f32(SMALLEST_SUM))
            divisor = b.select(normalize, b.select(enough, e.get(chosen), f32(SMALLEST_SUM)), f32(1.0))
            with e.loop(n_used) as s:
                at = e.at(weights, e.mul(s, 4))
                e.store(b.fmul(b.fdiv(e.load(at, f32, 4), divisor), scale), at, 4)

    return body


class _Scores:
    """One row's scores, made anew from its logits whenever they are looked at.

    Columns from `n` to the next multiple of 16 are there, with anything in them.
    """

    def __init__(self, e: Emitter, logits: Reg, n: Reg, scoring: str) -> None:
        self.e, self.logits, self.n, self.scoring = e, logits, n, scoring
        if scoring == "softmax":
            self.largest = e.splat(self._largest())
            self.total = e.splat(self._sum())

    def after(self, score: Reg, index: Reg) -> tuple[Reg, Reg]:
        """(score, expert) of what comes after this one: the largest below it, or an equal one of a higher number.

        Where nothing does, because of NaNs, the last expert: what is read as a number must be one.
        """
        e, b = self.e, self.e.b
        best, best_at = e.var(e.floats(-_INFINITY)), e.var(e.ints(_NONE))
        before, before_at = e.splat(score), e.splat(index)
        with self._each() as column:
            values, numbers, exists = self._vector(column)
            values = self._score(values)
            equal = b.and_(b.fcmp_ordered("==", values, before), b.icmp_signed(">", numbers, before_at))
            follows = b.and_(exists, b.or_(b.fcmp_ordered("<", values, before), equal))
            better = b.and_(follows, b.fcmp_ordered(">", values, e.get(best)))
            e.set(best, b.select(better, values, e.get(best)))
            e.set(best_at, b.select(better, numbers, e.get(best_at)))
        found = e.reduce_max(e.get(best))
        winners = b.select(b.fcmp_ordered("==", e.get(best), e.splat(found)), e.get(best_at), e.ints(_NONE))
        number = e.reduce_min(winners)
        highest = b.trunc(e.sub(self.n, 1), i32)
        return found, b.select(b.icmp_signed("<", number, highest), number, highest)

    def _each(self) -> Any:
        return self.e.loop(self.n, 0, self.e.L)

    def _vector(self, column: Reg) -> tuple[Reg, Reg, Reg]:
        """(logits, expert numbers, which of them are experts) from this column on."""
        e = self.e
        numbers = e.b.add(e.splat(e.b.trunc(column, i32)), e.lane_index())
        exists = e.b.icmp_signed("<", numbers, e.splat(e.b.trunc(self.n, i32)))
        return e.load(e.at(self.logits, e.mul(column, 4)), e.vf, 4), numbers, exists

    def _largest(self) -> Reg:
        e = self.e
        best = e.var(e.floats(-_INFINITY))
        with self._each() as column:
            values, _, exists = self._vector(column)
            e.set(best, e.fmax(e.b.select(exists, values, e.floats(-_INFINITY)), e.get(best)))
        return e.reduce_max(e.get(best))

    def _sum(self) -> Reg:
        e = self.e
        total = e.var(e.floats(0.0))
        with self._each() as column:
            values, _, exists = self._vector(column)
            powers = e.exp(e.b.fsub(values, self.largest))
            e.set(total, e.b.fadd(e.get(total), e.b.select(exists, powers, e.floats(0.0))))
        return e.reduce_add(e.get(total))

    def _score(self, logits: Reg) -> Reg:
        e, b = self.e, self.e.b
        if self.scoring == "softmax":
            return b.fdiv(e.exp(b.fsub(logits, self.largest)), self.total)
        decay = e.exp(b.fsub(e.floats(0.0), e.fabs(logits)))
        top = b.select(b.fcmp_ordered("<", logits, e.floats(0.0)), decay, e.floats(1.0))
        return b.fdiv(top, b.fadd(e.floats(1.0), decay))
