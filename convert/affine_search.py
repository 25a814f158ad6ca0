"""Scales and minimums for weight = d * scale * code - dmin * minimum (Q2_K, Q4_K, Q5_K), as Numba code.

A group's codes depend on its scale only through rounding, so candidates are tried; for fixed codes the best scale and
minimum solve a 2x2 least-squares problem, whose sums also give the error. Scales and minimums are then rounded to the
grid of their super-block: neighbours on the grid are tried, and the two factors of the super-block are fitted to the
codes they led to, in turn. Errors are weighted by the importance of each weight.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.half_float import round_to_half
from pyinfer.convert.jit import compiled
from pyinfer.convert.lanes import LANES, Lanes, group_function
from pyinfer.kernels_cpu.simd import Reg

_SINGULAR = 1e-6  # relative determinant below which all weights have the same code
_COARSE = [-2 + 0.25 * k for k in range(LANES)]  # candidates, in codes more or less than the range has
_FINE = [[-3 + 0.2 * k for k in range(i, i + LANES)] for i in (0, LANES)]
# Steps on the grid that the lanes try around the nearest scale and minimum; the last lane repeats the middle.
_SCALE_STEPS = [-1.0, 0.0, 1.0] * 5 + [0.0]
_MINIMUM_STEPS = [float(m) for m in (-2, -1, 0, 1, 2) for _ in range(3)] + [0.0]


def _emit_search(v: Lanes, top: Reg, batches: list[list[float]]) -> list[Reg]:
    """Scale and minimum of the best candidate, scale 0 where all weights are equal; sums of w and of w * x."""
    b, e = v.b, v.e
    low, high = e.fmin(v.fold(v.x, e.fmin), v.one(0.0)), v.fold(v.x, e.fmax)
    sum_w, sum_x = v.fold(v.w, b.fadd), v.fold(v.wx, b.fadd)
    lows, sums_w, sums_x = v.all(low), v.all(sum_w), v.all(sum_x)
    unit = v.inverse(b.fsub(v.all(high), lows))
    best = [v.one(-np.inf), v.one(0.0), low]
    for steps in batches:
        inverse = b.fmul(b.fadd(v.all(top), v.each(steps)), unit)
        sum_l, sum_ll, sum_lx = v.sums(inverse, b.fneg(b.fmul(lows, inverse)), v.all(top))
        product = b.fmul(sums_w, sum_ll)
        determinant = b.fsub(product, b.fmul(sum_l, sum_l))
        solved = v.inverse(determinant)
        scale = b.fmul(b.fsub(b.fmul(sums_w, sum_lx), b.fmul(sums_x, sum_l)), solved)
        offset = b.fmul(b.fsub(b.fmul(sum_ll, sums_x), b.fmul(sum_l, sum_lx)), solved)
        # the format only subtracts a minimum; and weights that all have one code need none
        is_singular = b.fcmp_ordered("<=", determinant, b.fmul(product, v.all(_SINGULAR)))
        alone = b.or_(b.fcmp_ordered(">", offset, v.all(0.0)), is_singular)
        scale = b.select(alone, b.fmul(sum_lx, v.inverse(sum_ll)), scale)
        offset = b.select(alone, v.all(0.0), offset)
        # by this much the codes lower the sum of squares
        gain = b.fadd(b.fmul(scale, sum_lx), b.fmul(offset, sums_x))
        gain = b.select(b.fcmp_ordered(">", scale, v.all(0.0)), gain, v.all(-np.inf))
        found = v.pick(gain, [gain, scale, offset])
        better = b.fcmp_ordered(">", found[0], best[0])
        best = [b.select(better, new, old) for new, old in zip(found, best, strict=True)]
    return [best[1], b.fneg(best[2]), sum_w, sum_x]


def _emit_fit(
    v: Lanes, top: Reg, largest: Reg, d: Reg, dmin: Reg, near_scale: Reg, near_low: Reg, sum_w: Reg, sum_x: Reg
) -> list[Reg]:
    """Candidates are scales and minimums on the grid, next to the near ones, which are in steps of d and dmin."""
    b = v.b

    def steps(near: Reg, around: list[float]) -> Reg:
        nearest = v.floor(b.fadd(v.all(near), v.all(0.5)))
        return v.clip(b.fadd(nearest, v.each(around)), v.all(0.0), v.all(largest))

    scale_code, low_code = steps(near_scale, _SCALE_STEPS), steps(near_low, _MINIMUM_STEPS)
    scale, low = b.fmul(scale_code, v.all(d)), b.fmul(low_code, v.all(dmin))
    inverse = v.inverse(scale)
    sum_l, sum_ll, sum_lx = v.sums(inverse, b.fmul(low, inverse), v.all(top))
    slope = b.fadd(sum_lx, b.fmul(low, sum_l))
    slope = b.fmul(scale, b.fsub(b.fadd(slope, slope), b.fmul(scale, sum_ll)))
    shift = b.fadd(b.fmul(low, v.all(sum_w)), b.fadd(v.all(sum_x), v.all(sum_x)))
    gain = b.fsub(slope, b.fmul(low, shift))
    return v.pick(gain, [scale_code, low_code, gain, sum_l, sum_ll, sum_lx])


# float32 results of a search: scale, minimum, sum of w, sum of wx
search_coarsely = group_function("search_coarsely", 1, lambda v, top: _emit_search(v, top, [_COARSE]))
search_finely = group_function("search_finely", 1, lambda v, top: _emit_search(v, top, _FINE))
# codes of scale and minimum, gain, sums of w*l, w*l*l, w*l*x
_fit_group = group_function("_fit_group", 8, _emit_fit)


@compiled
def _fit_grid(addresses, group, top, largest, d, dmin, wanted, scales, minimums, found):  # type: ignore[no-untyped-def]
    """Choose every group's scale and minimum. Returns the gain, and the factors that fit the resulting codes best."""
    x, w, wx = addresses
    gain = aa = ab = bb = ax = bx = 0.0
    unit_d, unit_dmin = _inverse(d), _inverse(dmin)
    out = found.ctypes.data
    for g in range(len(wanted)):
        at = 4 * g * group
        sum_w, sum_x = wanted[g, 2], wanted[g, 3]
        near_scale, near_low = wanted[g, 0] * unit_d, wanted[g, 1] * unit_dmin
        _fit_group(
            x + at, w + at, wx + at, group, out, top, largest, d, dmin, near_scale, near_low, sum_w, sum_x
        )  # fmt: skip
        scales[g], minimums[g] = found[0], found[1]
        scale, low = np.float64(found[0]), np.float64(found[1])
        gain += found[2]
        aa += scale * scale * found[4]
        ab -= scale * low * found[3]
        bb += low * low * sum_w
        ax += scale * found[5]
        bx -= low * sum_x
    determinant = aa * bb - ab * ab
    if determinant > 1e-9 * aa * bb:
        return gain, (ax * bb - bx * ab) / determinant, (aa * bx - ab * ax) / determinant
    return gain, ax / aa if aa > 0 else 0.0, 0.0


@compiled
def _inverse(unit):  # type: ignore[no-untyped-def]
    return np.float32(1) / unit if unit > np.float32(1e-30) else np.float32(0)


@compiled
def fit_affine(x, w, wx, group, top, largest, is_fine, rounds, scales, minimums):  # type: ignore[no-untyped-def]
    """(d, dmin), exact in float16, of one super-block x (256,) with importances w (256,) and wx = w * x.

    The codes of the groups' scales and minimums, 0..largest, go to row 0 of uint8 `scales` and `minimums`
    (2, 256 / group).
    """
    addresses = (x.ctypes.data, w.ctypes.data, wx.ctypes.data)
    wanted, found = np.empty((scales.shape[1], 4), np.float32), np.empty(6, np.float32)
    d = dmin = np.float32(0)
    for g in range(len(wanted)):
        at, out = 4 * g * group, wanted[g].ctypes.data
        if is_fine:
            search_finely(addresses[0] + at, addresses[1] + at, addresses[2] + at, group, out, top)
        else:
            search_coarsely(addresses[0] + at, addresses[1] + at, addresses[2] + at, group, out, top)
        d, dmin = max(d, wanted[g, 0]), max(dmin, wanted[g, 1])
    d, dmin = round_to_half(d / largest), round_to_half(dmin / largest)
    best_gain, best_d, best_dmin = -np.inf, d, dmin
    for _ in range(rounds):
        gain, next_d, next_dmin = _fit_grid(
            addresses, group, top, largest, d, dmin, wanted, scales[1], minimums[1], found
        )
        if gain <= best_gain:
            break
        best_gain, best_d, best_dmin = gain, d, dmin
        for g in range(len(wanted)):
            scales[0, g], minimums[0, g] = scales[1, g], minimums[1, g]
        d, dmin = round_to_half(np.float32(max(next_d, 0.0))), round_to_half(np.float32(max(next_dmin, 0.0)))
    return best_d, best_dmin
