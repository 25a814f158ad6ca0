"""Finding scales for the K types: weighted least squares over a grid of candidate scales, then over the super-block.

A group's codes depend on its scale only through rounding, so each candidate gives codes, and for fixed codes the best
scale (and minimum) is a small linear least-squares problem. The best scales are then rounded to the few bits that the
format has for them, and the float16 factors of the super-block are fitted once more to the final codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyinfer.quant.codec import ByteArray, FloatArray

_SPREAD = 0.1  # distance of two candidates, in codes
_LARGEST = np.float32(2**28)  # no K type can express more, and its fourth power still fits float32
_ONE = np.float32(1)


@dataclass(frozen=True)
class AffineBlocks:
    """weight = d * scale * code - dmin * minimum, for n super-blocks of G groups."""

    d: FloatArray  # (n, 1), exact in float16
    dmin: FloatArray  # (n, 1), exact in float16
    scales: ByteArray  # (n, G)
    minimums: ByteArray  # (n, G)
    codes: ByteArray  # (n, 256)


@dataclass(frozen=True)
class SignedBlocks:
    """weight = d * scale * (code - zero), for n super-blocks of G groups."""

    d: FloatArray  # (n, 1), exact in float16
    scales: FloatArray  # (n, G), whole numbers
    codes: ByteArray  # (n, 256)


def fit_affine(weights: FloatArray, group: int, top: int, scale_top: int, steps: int) -> AffineBlocks:
    """Codes 0..top in groups of `group` weights, scales and minimums 0..scale_top; `steps` candidates either side."""
    x = weights.reshape(len(weights), -1, group).clip(-_LARGEST, _LARGEST)
    importance = np.abs(x) + np.sqrt(np.square(x).mean(axis=-1, keepdims=True))  # large weights meet large errors
    scale, minimum = _search_affine(x, importance, top, steps)
    d, scales = _round_scales(scale[..., 0], scale_top)
    dmin, minimums = _round_scales(minimum[..., 0], scale_top)
    codes = _affine_codes(x, d, dmin, scales, minimums, top)
    refit_d, refit_dmin = _refit_affine(x, importance, codes, scales, minimums)
    refit_codes = _affine_codes(x, refit_d, refit_dmin, scales, minimums, top)
    before = _affine_error(x, importance, codes, d, dmin, scales, minimums)
    after = _affine_error(x, importance, refit_codes, refit_d, refit_dmin, scales, minimums)
    better = (after < before)[:, None]
    codes = np.where(better[..., None], refit_codes, codes).reshape(weights.shape)
    d, dmin = np.where(better, refit_d, d), np.where(better, refit_dmin, dmin)
    return AffineBlocks(d, dmin, scales.astype(np.uint8), minimums.astype(np.uint8), codes.astype(np.uint8))


def fit_signed(weights: FloatArray, group: int, zero: int, scale_low: int, steps: int) -> SignedBlocks:
    """Codes 0..2*zero-1 around `zero`, scales scale_low..-scale_low-1."""
    x = weights.reshape(len(weights), -1, group).clip(-_LARGEST, _LARGEST)
    scale = _search_signed(x, zero, steps)[..., 0]
    at = np.abs(scale).argmax(axis=-1, keepdims=True)
    d = _to_half(np.take_along_axis(scale, at, axis=-1) / np.float32(scale_low))
    scales = np.rint(scale * _inverse(d)).clip(scale_low, -scale_low - 1)
    codes = _signed_codes(x, d, scales, zero)
    product = scales[:, :, None] * codes
    importance = np.square(x)
    refit_d = _to_half(
        _ratio((importance * product * x).sum((1, 2)), (importance * np.square(product)).sum((1, 2)))[:, None]
    )
    refit_codes = _signed_codes(x, refit_d, scales, zero)
    before = (importance * np.square(d[..., None] * product - x)).sum((1, 2))
    after = (importance * np.square(refit_d[..., None] * scales[:, :, None] * refit_codes - x)).sum((1, 2))
    better = (after < before)[:, None]
    codes = np.where(better[..., None], refit_codes, codes) + np.float32(zero)
    return SignedBlocks(np.where(better, refit_d, d), scales, codes.reshape(weights.shape).astype(np.uint8))


def _search_affine(x: FloatArray, importance: FloatArray, top: int, steps: int) -> tuple[FloatArray, FloatArray]:
    """Scale and minimum (subtracted, never negative) of each group: the best over 2*steps+1 candidate scales."""
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    unit = _inverse(x.max(axis=-1, keepdims=True) - low)
    sum_w = importance.sum(axis=-1, keepdims=True)
    sum_x = (importance * x).sum(axis=-1, keepdims=True)
    best_error = np.full_like(low, np.inf)
    best_scale, best_low = np.zeros_like(low), low
    for step in range(-steps, steps + 1):
        codes = np.rint((x - low) * (unit * np.float32(top + _SPREAD * step))).clip(0, top)
        weighted = importance * codes
        sum_l = weighted.sum(axis=-1, keepdims=True)
        sum_ll = (weighted * codes).sum(axis=-1, keepdims=True)
        sum_xl = (weighted * x).sum(axis=-1, keepdims=True)
        determinant = sum_w * sum_ll - sum_l * sum_l
        solvable = determinant > np.float32(1e-5) * sum_w * sum_ll  # else all weights share a code
        offset = np.where(solvable, _ratio(sum_ll * sum_x - sum_l * sum_xl, determinant), low)
        offset = np.minimum(offset, 0)  # the format only subtracts a minimum
        scale = _ratio(sum_xl - offset * sum_l, sum_ll)
        error = (importance * np.square(scale * codes + offset - x)).sum(axis=-1, keepdims=True)
        better = (error < best_error) & (scale > 0)
        best_error = np.where(better, error, best_error)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, offset, best_low)
    return best_scale, -best_low


def _search_signed(x: FloatArray, zero: int, steps: int) -> FloatArray:
    """Scale of each group, errors weighted by the square of the weight; the sign puts the largest weight on code 0."""
    at = np.abs(x).argmax(axis=-1, keepdims=True)
    unit = -_inverse(np.take_along_axis(x, at, axis=-1))
    importance = np.square(x)
    best_gain = np.zeros_like(unit)
    best_scale = np.zeros_like(unit)
    for step in range(-steps, steps + 1):
        codes = np.rint(x * (unit * np.float32(zero + _SPREAD * step))).clip(-zero, zero - 1)
        weighted = importance * codes
        sum_ll = (weighted * codes).sum(axis=-1, keepdims=True)
        sum_xl = (weighted * x).sum(axis=-1, keepdims=True)
        scale = _ratio(sum_xl, sum_ll)
        gain = scale * sum_xl  # by this much the best scale for these codes lowers the error
        better = gain > best_gain
        best_gain, best_scale = np.where(better, gain, best_gain), np.where(better, scale, best_scale)
    return best_scale


def _round_scales(scale: FloatArray, top: int) -> tuple[FloatArray, FloatArray]:
    """(factor (n, 1), codes (n, G) 0..top) of scales (n, G) >= 0."""
    factor = _to_half(scale.max(axis=-1, keepdims=True) / np.float32(top))
    return factor, np.rint(scale * _inverse(factor)).clip(0, top)


def _affine_codes(
    x: FloatArray, d: FloatArray, dmin: FloatArray, scales: FloatArray, minimums: FloatArray, top: int
) -> FloatArray:
    shifted = x + (dmin * minimums)[:, :, None]
    codes: FloatArray = np.rint(shifted * _inverse(d * scales)[:, :, None]).clip(0, top)
    return codes


def _signed_codes(x: FloatArray, d: FloatArray, scales: FloatArray, zero: int) -> FloatArray:
    codes: FloatArray = np.rint(x * _inverse(d * scales)[:, :, None]).clip(-zero, zero - 1)
    return codes


def _affine_error(
    x: FloatArray,
    importance: FloatArray,
    codes: FloatArray,
    d: FloatArray,
    dmin: FloatArray,
    scales: FloatArray,
    minimums: FloatArray,
) -> FloatArray:
    """Weighted squared error (n,) of each super-block."""
    restored = (d * scales)[:, :, None] * codes - (dmin * minimums)[:, :, None]
    error: FloatArray = (importance * np.square(restored - x)).sum(axis=(1, 2))
    return error


def _refit_affine(
    x: FloatArray, importance: FloatArray, codes: FloatArray, scales: FloatArray, minimums: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The two factors (n, 1) that fit given codes best; their 2x2 system can be close to singular, hence float64."""
    a = (scales[:, :, None] * codes).astype(np.float64)
    b = np.broadcast_to(-minimums[:, :, None], a.shape).astype(np.float64)
    w = importance.astype(np.float64)
    aa, ab, bb = (w * a * a).sum((1, 2)), (w * a * b).sum((1, 2)), (w * b * b).sum((1, 2))
    ax, bx = (w * a * x).sum((1, 2)), (w * b * x).sum((1, 2))
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-9 * aa * bb
    safe = np.where(solvable, determinant, 1)
    d = np.where(solvable, (ax * bb - bx * ab) / safe, ax / np.where(aa > 0, aa, 1))
    dmin = np.where(solvable, (aa * bx - ab * ax) / safe, 0)
    return _to_half(d[:, None].clip(0).astype(np.float32)), _to_half(dmin[:, None].clip(0).astype(np.float32))


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """numerator / denominator, 0 where the denominator is not positive."""
    positive = denominator > 0
    return np.where(positive, numerator / np.where(positive, denominator, _ONE), np.float32(0))


def _inverse(x: FloatArray) -> FloatArray:
    usable = np.abs(x) > np.finfo(np.float32).tiny
    return np.where(usable, _ONE / np.where(usable, x, _ONE), np.float32(0))


def _to_half(x: FloatArray) -> FloatArray:
    limit = np.finfo(np.float16).max
    return x.clip(-limit, limit).astype(np.float16).astype(np.float32)
