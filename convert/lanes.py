"""Vector code of the scale searches, to be called from Numba: 16 candidates at a time, one in each lane.

Nothing is summed across lanes but what a fixed tree sums, and nothing is fast-math: results are the same on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i32, vector

LANES = 16
_FLOATS = vector(f32, LANES)


class Lanes:
    """Sixteen float32 lanes over one group of weights: x, their importances w and wx = w * x, all float32 (count,)."""

    def __init__(self, emitter: Emitter, x: Reg, w: Reg, wx: Reg, count: Reg) -> None:
        self.e, self.b = emitter, emitter.b
        self.x, self.w, self.wx = (emitter.ptr(address) for address in (x, w, wx))
        self.count = count

    def all(self, value: float | Reg) -> Reg:
        """The same number in every lane."""
        return ir.Constant(_FLOATS, [value] * LANES) if isinstance(value, float) else self.e.splat(value, LANES)

    def one(self, value: float) -> Reg:
        """A number outside the lanes."""
        return ir.Constant(f32, value)

    def each(self, values: Sequence[float]) -> Reg:
        return ir.Constant(_FLOATS, list(values))

    def inverse(self, a: Reg) -> Reg:
        """1 / a, and 0 for an a so small that this would be infinite."""
        usable = self.b.fcmp_ordered(">", self.absolute(a), self.all(1e-30))
        return self.b.select(usable, self.b.fdiv(self.all(1.0), a), self.all(0.0))

    def absolute(self, a: Reg) -> Reg:
        return self.e.call(f"llvm.fabs.v{LANES}f32", _FLOATS, [a])

    def floor(self, a: Reg) -> Reg:
        return self.e.call(f"llvm.floor.v{LANES}f32", _FLOATS, [a])

    def clip(self, a: Reg, low: Reg, high: Reg) -> Reg:
        return self.e.fmax(self.e.fmin(a, high), low)

    def fold(self, address: Reg, combine: Callable[[Reg, Reg], Reg]) -> Reg:
        """One float32 of `count` (a multiple of 16) at an address, combined in a fixed order."""
        slot = self.e.var(self.e.load(address, _FLOATS, 4))
        with self.e.loop(self.count, LANES, LANES) as i:
            part = self.e.load(self.e.at(address, self.e.mul(i, 4)), _FLOATS, 4)
            self.e.set(slot, combine(self.e.get(slot), part))
        value, n = self.e.get(slot), LANES
        while n > 1:
            n //= 2
            value = combine(self.e.shuffle(value, range(n)), self.e.shuffle(value, range(n, 2 * n)))
        return self.b.extract_element(value, i32(0))

    def sums(self, inverse: Reg, bias: Reg, top: Reg, zero: Reg | None = None) -> tuple[Reg, Reg, Reg]:
        """Sums of w*l, w*l*l and w*l*x, where l + zero = clip(round(x * inverse + bias), 0, top); all are lanes."""
        e, b = self.e, self.b
        half, nothing = self.all(0.5), self.all(0.0)
        limit, shift = b.fadd(top, half), b.fadd(bias, half)
        totals = [e.var(nothing) for _ in range(3)]
        with e.loop(self.count) as i:
            x, w, wx = (self.all(e.load(e.at(p, e.mul(i, 4)), f32, 4)) for p in (self.x, self.w, self.wx))
            value = self.clip(b.fadd(b.fmul(x, inverse), shift), nothing, limit)
            code = b.sitofp(b.fptosi(value, vector(i32, LANES)), _FLOATS)
            if zero is not None:
                code = b.fsub(code, zero)
            weighted = b.fmul(w, code)
            for total, product in zip(totals, (weighted, b.fmul(weighted, code), b.fmul(wx, code)), strict=True):
                e.set(total, b.fadd(e.get(total), product))
        return e.get(totals[0]), e.get(totals[1]), e.get(totals[2])

    def pick(self, gain: Reg, values: Sequence[Reg]) -> list[Reg]:
        """The values of the lane with the largest gain; of equal ones the first half's. A NaN is never the best."""
        index, n = ir.Constant(vector(i32, LANES), list(range(LANES))), LANES
        while n > 1:
            n //= 2
            low, high = range(n), range(n, 2 * n)
            first, second = self.e.shuffle(gain, low), self.e.shuffle(gain, high)
            is_second = self.b.fcmp_ordered(">", second, first)
            index = self.b.select(is_second, self.e.shuffle(index, high), self.e.shuffle(index, low))
            gain = self.b.select(is_second, second, first)
        best = self.b.extract_element(index, i32(0))
        return [self.b.extract_element(value, best) for value in values]


def group_function(name: str, n_floats: int, emit: Callable[..., Sequence[Reg]]) -> Any:
    """An intrinsic `name(x, w, wx, count, out, *floats)`: addresses of float32, a count, and float32 numbers.

    `emit(lanes, *floats)` gives the scalars that go to `out`, in that order.
    """
    signature = types.void(*([types.int64] * 5), *([types.float32] * n_floats))

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        emitter = Emitter(builder, current_isa())
        results = emit(Lanes(emitter, *args[:4]), *args[5:])
        out = emitter.ptr(args[4])
        for i, value in enumerate(results):
            emitter.store(value, emitter.at(out, 4 * i), 4)
        return context.get_dummy_value()

    parameters = ", ".join(["x", "w", "wx", "count", "out", *(f"f{i}" for i in range(n_floats))])
    scope: dict[str, Any] = {"signature": signature, "codegen": codegen}
    exec(f"def {name}(typingctx, {parameters}):\n    return signature, codegen\n", scope)
    return intrinsic(scope[name])
