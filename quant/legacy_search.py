"""Scales of the 32-weight types: one division a block, rounding done as ggml's reference quantizers do."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, FloatArray


def signed_codes(weights: FloatArray, zero: int) -> tuple[FloatArray, ByteArray]:
    """(scale (n, 1), codes (n, 32) below 2*zero): the weight of the largest magnitude gets code 0, code `zero` is 0."""
    at = np.abs(weights).argmax(axis=-1, keepdims=True)
    extreme = np.take_along_axis(weights, at, axis=-1) + np.float32(0)  # a zero loses its sign, as in ggml
    scale = extreme / np.float32(-zero)
    codes = np.trunc(weights * inverse(scale) + np.float32(zero + 0.5))
    return scale, codes.clip(0, 2 * zero - 1).astype(np.uint8)


def affine_codes(weights: FloatArray, top: int) -> tuple[FloatArray, FloatArray, ByteArray]:
    """(scale (n, 1), minimum (n, 1), codes (n, 32) 0..top): the range from minimum to maximum in `top` equal steps."""
    low = weights.min(axis=-1, keepdims=True)
    scale = (weights.max(axis=-1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((weights - low) * inverse(scale) + np.float32(0.5))
    return scale, low, codes.clip(0, top).astype(np.uint8)


def inverse(scale: FloatArray) -> FloatArray:
    """1/scale; 0 where that is infinite, for such a scale is 0 in float16 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        result = np.float32(1) / scale
    result[np.isinf(result)] = 0
    return result


def high_bits(field: ByteArray) -> ByteArray:
    """Fifth bits (n, 32) out of the uint32 (n, 4 bytes) that Q5_0 and Q5_1 keep them in."""
    word = field.view(np.uint32)
    bits: ByteArray = ((word >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8)
    return bits


def pack_high_bits(codes: ByteArray) -> ByteArray:
    """The uint32 (n, 4 bytes) of bit 4 of each code (n, 32)."""
    bits = (codes >> 4).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    packed: ByteArray = bits.sum(axis=-1, dtype=np.uint32, keepdims=True).view(np.uint8)
    return packed
