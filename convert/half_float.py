"""float16 in Numba code, which has no such type on the CPU."""

from __future__ import annotations

import numpy as np

from pyinfer.convert.jit import compiled

_LARGEST = np.float32(65504)
_SMALLEST_NORMAL = np.float32(2**-14)
_SPLITTER = np.float32(2**13 + 1)
_HALF = np.float32(0.5)


@compiled
def round_to_half(x):  # type: ignore[no-untyped-def]
    """A float32 that float16 holds exactly: the nearest, ties to even, at most 65504 in magnitude."""
    size = min(abs(x), _LARGEST)
    if size < _SMALLEST_NORMAL:
        size = (size + _HALF) - _HALF  # float32 next to 0.5 has float16's smallest step
    else:
        wide = size * _SPLITTER  # Veltkamp's split keeps the upper 11 bits
        size = wide - (wide - size)
    return -size if x < 0 else size


@compiled
def half_bits(x):  # type: ignore[no-untyped-def]
    """The 16 bits of a float32 that float16 holds exactly."""
    bits = np.int64(np.float32(x).view(np.uint32))
    sign, exponent, fraction = (bits >> 16) & 0x8000, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if exponent < 113:  # subnormal or zero: a whole number of steps of 2**-24
        return sign | np.int64(abs(x) * np.float32(2**24))
    return sign | ((exponent - 112) << 10) | (fraction >> 13)


@compiled
def store_half(out, at, x):  # type: ignore[no-untyped-def]
    """Write a float32 that float16 holds exactly into two bytes, low byte first."""
    bits = half_bits(x)
    out[at], out[at + 1] = bits & 0xFF, bits >> 8
