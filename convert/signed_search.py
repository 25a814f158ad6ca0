"""Scales for weight = d * scale * (code - zero) (Q3_K, Q6_K, and Q4_0 and Q5_0 with an imatrix), as Numba code.

The counterpart of `affine_search` without minimums: for fixed codes the best scale is a ratio of two sums.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.half_float import round_to_half
from pyinfer.convert.jit import compiled, stack_array
from pyinfer.convert.lanes import LANES, Lanes, group_function
from pyinfer.kernels_cpu.simd import Reg

_BEFORE = LANES // 2  # lanes below the middle
# Candidates: the sign that the largest weight gets, and how many codes more than `zero` it is scaled to.
_CANDIDATES = [(-1.0, [-1 + 0.2 * k for k in range(LANES)]), (1.0, [-2 + 0.2 * k for k in range(LANES)])]
_NEAR = [float(k - _BEFORE) for k in range(LANES)]


def _emit_search(v: Lanes, zero: Reg) -> list[Reg]:
    """Candidates put the largest weight at, or next to, code 0; or beyond it, which clips it; or on the other side."""
    b = v.b
    low, high = v.fold(v.x, v.e.fmin), v.fold(v.x, v.e.fmax)
    extreme = b.select(b.fcmp_ordered(">", high, b.fneg(low)), high, low)
    zeros, unit = v.all(zero), v.inverse(v.all(extreme))
    best = [v.one(0.0), v.one(0.0)]
    for signs, steps in _CANDIDATES:
        inverse = b.fmul(b.fmul(b.fadd(zeros, v.each(steps)), v.all(signs)), unit)
        _, sum_ll, sum_lx = v.sums(inverse, zeros, _top(v, zeros), zeros)
        scale = b.fmul(sum_lx, v.inverse(sum_ll))
        gain = b.fmul(scale, sum_lx)
        found = v.pick(gain, [gain, scale])
        better = b.fcmp_ordered(">", found[0], best[0])
        best = [b.select(better, new, old) for new, old in zip(found, best, strict=True)]
    return [best[1]]


def _emit_fit(v: Lanes, zero: Reg, lowest: Reg, d: Reg, unit: Reg, wanted: Reg) -> list[Reg]:
    """Candidates are the whole multiples of d around the wanted scale; `unit` is 1 / d."""
    b = v.b
    zeros, lowests = v.all(zero), v.all(lowest)
    near = v.floor(b.fadd(b.fmul(v.all(wanted), v.all(unit)), v.all(0.5)))
    code = v.clip(b.fadd(near, v.each(_NEAR)), lowests, b.fsub(b.fneg(lowests), v.all(1.0)))
    scale = b.fmul(code, v.all(d))
    _, sum_ll, sum_lx = v.sums(v.inverse(scale), zeros, _top(v, zeros), zeros)
    # by this much the codes lower the sum of squares
    gain = b.fmul(scale, b.fsub(b.fadd(sum_lx, sum_lx), b.fmul(scale, sum_ll)))
    return v.pick(gain, [code, gain, sum_ll, sum_lx])


def _top(v: Lanes, zeros: Reg) -> Reg:
    return v.b.fsub(v.b.fadd(zeros, zeros), v.all(1.0))


_groups_array, _found_array = stack_array(np.float32, 16), stack_array(np.float32, 4)
# float32 result: the scale
search_signed = group_function("search_signed", 1, _emit_search)
_fit_group = group_function("_fit_group", 5, _emit_fit)  # code, gain, sum of w*l*l, of w*l*x


@compiled
def _fit_grid(addresses, group, zero, lowest, d, wanted, scales, found):  # type: ignore[no-untyped-def]
    """Choose every group's scale on the grid of d. Returns the gain, and the d that fits the resulting codes best."""
    x, w, wx = addresses
    gain = ss = sx = 0.0
    unit = np.float32(1) / d if abs(d) > np.float32(1e-30) else np.float32(0)
    out = found.ctypes.data
    for g in range(wanted.size):
        at = 4 * g * group
        _fit_group(x + at, w + at, wx + at, group, out, zero, lowest, d, unit, wanted[g])
        scales[g] = found[0]
        code = np.float64(found[0])
        gain += found[1]
        ss += code * code * found[2]
        sx += code * found[3]
    return gain, sx / ss if ss > 0 else 0.0


@compiled
def fit_signed(x, w, wx, group, zero, lowest, rounds, scales):  # type: ignore[no-untyped-def]
    """d, exact in float16, of one super-block x (256,) with importances w (256,) and wx = w * x.

    The groups' scales, lowest..-lowest-1, go to row 0 of int8 `scales` (2, 256 / group).
    """
    addresses = (x.ctypes.data, w.ctypes.data, wx.ctypes.data)
    wanted, found = _groups_array()[: scales.shape[1]], _found_array()
    out = found.ctypes.data
    extreme = np.float32(0)
    for g in range(wanted.size):
        at = 4 * g * group
        search_signed(addresses[0] + at, addresses[1] + at, addresses[2] + at, group, out, zero)
        wanted[g] = found[0]
        if abs(wanted[g]) > abs(extreme):
            extreme = wanted[g]
    d = round_to_half(extreme / lowest)
    best_gain, best_d = -np.inf, d
    for _ in range(rounds):
        gain, next_d = _fit_grid(addresses, group, zero, lowest, d, wanted, scales[1], found)
        if gain <= best_gain:
            break
        best_gain, best_d = gain, d
        for g in range(wanted.size):
            scales[0, g] = scales[1, g]
        d = round_to_half(np.float32(next_d))
    return best_d
