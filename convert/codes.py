"""Codes of weights once their scale is known, as Numba code.

These are the operations that the searches reckoned with, in the same order, so that codes are those they chose.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.jit import compiled


@compiled
def write_affine_codes(x, first, stop, top, scale, low, codes):  # type: ignore[no-untyped-def]
    """Codes of weights first..stop-1, weight = scale * code - low."""
    inverse = np.float32(1) / scale if scale > np.float32(1e-30) else np.float32(0)
    _round(x, first, stop, inverse, low * inverse + np.float32(0.5), top + np.float32(0.5), codes)


@compiled
def write_signed_codes(x, first, stop, zero, scale, codes):  # type: ignore[no-untyped-def]
    """Codes of weights first..stop-1, weight = scale * (code - zero)."""
    inverse = np.float32(1) / scale if abs(scale) > np.float32(1e-30) else np.float32(0)
    _round(x, first, stop, inverse, zero + np.float32(0.5), zero + zero - np.float32(0.5), codes)


@compiled
def _round(x, first, stop, inverse, shift, limit, codes):  # type: ignore[no-untyped-def]
    for i in range(first, stop):
        codes[i] = np.int32(max(min(x[i] * inverse + shift, limit), np.float32(0)))


@compiled
def store_nibbles(codes, to, at):  # type: ignore[no-untyped-def]
    """The codes of 32 weights from byte `at` of a block on, 5-bit ones where nibbles alone would not fill it."""
    if to.size - at == 20:
        for byte in range(4):
            fifths = np.uint8(0)
            for bit in range(8):
                fifths |= (codes[8 * byte + bit] >> 4) << bit
            to[at + byte] = fifths
        at += 4
    for i in range(16):
        to[at + i] = (codes[i] & 15) | ((codes[i + 16] & 15) << 4)
