"""Scales and minimums for weight = d * scale * code - dmin * minimum (Q2_K, Q4_K, Q5_K), as Numba code.

A group's codes depend on its scale only through rounding, so candidates are tried; for fixed codes the best scale and
minimum solve a 2x2 least-squares problem, whose sums also give the error. Scales and minimums are then rounded to the
grid of their super-block: neighbours on the grid are tried, and the two factors of the super-block are fitted to the
codes they led to, in turn. Errors are weighted by the importance of each weight.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.half_float import round_to_half
from pyinfer.convert.jit import compiled, stack_array
from pyinfer.convert.lanes import LANES, Lanes, group_function
from pyinfer.kernels_cpu.simd import Reg

_SINGULAR = 1e-6  # relative determinant below which all weights have the same code
# Candidates of a scale, in codes more or less than the range has.
_CANDIDATES = [[-3 + 0.2 * k for k in range(i, i + LANES)] for i in (0, LANES)]
_N_FACTORS, _FACTOR_STEP = 48, np.float32(0.003)
# Steps on the grid that the lanes try around the nearest scale and minimum; the last lane repeats the middle.
_SCALE_STEPS = [-1.0, 0.0, 1.0] * 5 + [0.0]
_MINIMUM_STEPS = [float(m) for m in (-2, -1, 0, 1, 2) for _ in range(3)] + [0.0]


def _emit_search(v: Lanes, top: Reg) -> list[Reg]:
    """Scale and minimum of the best candidate, scale 0 where all weights are equal; sums of w, w*x, w*l and w*l*l."""
    b, e = v.b, v.e
    low, high = e.fmin(v.fold(v.x, e.fmin), v.one(0.0)), v.fold(v.x, e.fmax)
    sum_w, sum_x = v.fold(v.w, b.fadd), v.fold(v.wx, b.fadd)
    lows, sums_w, sums_x = v.all(low), v.all(sum_w), v.all(sum_x)
    unit = v.inverse(b.fsub(v.all(high), lows))
    best = [v.one(-np.inf), v.one(0.0), low, v.one(0.0), v.one(0.0)]
    for steps in _CANDIDATES:
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
        found = v.pick(gain, [gain, scale, offset, sum_l, sum_ll])
        better = b.fcmp_ordered(">", found[0], best[0])
        best = [b.select(better, new, old) for new, old in zip(found, best, strict=True)]
    return [best[1], b.fneg(best[2]), sum_w, sum_x, best[3], best[4]]


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


_groups_array, _found_array = stack_array(np.float32, 16, 6), stack_array(np.float32, 6)
# float32 results of a search: scale, minimum, sums of w, w*x, w*l, w*l*l
search_affine = group_function("search_affine", 1, _emit_search)
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
def fit_affine(x, w, wx, group, top, largest, rounds, scales, minimums):  # type: ignore[no-untyped-def]
    """(d, dmin), exact in float16, of one super-block x (256,) with importances w (256,) and wx = w * x.

    The codes of the groups' scales and minimums, 0..largest, go to row 0 of uint8 `scales` and `minimums`
    (2, 256 / group). Starts from the smallest factors that reach all scales, and from larger ones that fit them better.
    """
    addresses = (x.ctypes.data, w.ctypes.data, wx.ctypes.data)
    wanted, found = _groups_array()[: scales.shape[1]], _found_array()
    least_d = least_dmin = np.float32(0)
    for g in range(len(wanted)):
        at = 4 * g * group
        search_affine(addresses[0] + at, addresses[1] + at, addresses[2] + at, group, wanted[g].ctypes.data, top)
        least_d, least_dmin = max(least_d, wanted[g, 0]), max(least_dmin, wanted[g, 1])
    least_d, least_dmin = least_d / largest, least_dmin / largest
    best_gain, best_d, best_dmin = -np.inf, np.float32(0), np.float32(0)
    for is_fitted in (False, True):
        d, dmin = least_d, least_dmin
        if is_fitted:
            d, dmin = _fitting_factor(wanted, d, 0), _fitting_factor(wanted, dmin, 1)
        d, dmin = round_to_half(d), round_to_half(dmin)
        last_gain = -np.inf
        for _ in range(rounds):
            gain, next_d, next_dmin = _fit_grid(
                addresses, group, top, largest, d, dmin, wanted, scales[1], minimums[1], found
            )
            if gain <= last_gain:
                break
            last_gain = gain
            if gain > best_gain:
                best_gain, best_d, best_dmin = gain, d, dmin
                for g in range(len(wanted)):
                    scales[0, g], minimums[0, g] = scales[1, g], minimums[1, g]
            d, dmin = round_to_half(np.float32(max(next_d, 0.0))), round_to_half(np.float32(max(next_dmin, 0.0)))
    return best_d, best_dmin


@compiled
def _fitting_factor(wanted, least, which):  # type: ignore[no-untyped-def]
    """The factor, `least` or up to a seventh more, whose multiples come nearest to all scales (0) or minimums (1)."""
    best_error, best = np.float32(np.inf), least
    for k in range(_N_FACTORS):
        factor = least * (np.float32(1) + _FACTOR_STEP * np.float32(k))
        inverse, error = _inverse(factor), np.float32(0)
        for g in range(len(wanted)):
            sum_w, sum_l, sum_ll = wanted[g, 2], wanted[g, 4], wanted[g, 5]
            # a wrong scale costs what no minimum can make up for
            cost = sum_w if which == 1 or sum_w <= 0 else sum_ll - sum_l * sum_l / sum_w
            off = wanted[g, which] - factor * np.floor(wanted[g, which] * inverse + np.float32(0.5))
            error += cost * off * off
        if error < best_error:
            best_error, best = error, factor
    return best
