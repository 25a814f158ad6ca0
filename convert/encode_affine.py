"""Q2_K, Q4_K and Q5_K: search and packing in one pass, as Numba code.

Every `encode_*` fills uint8 `out` (rows, bytes a row) from float32 x (rows, columns); `columns` are the importances of
the columns, empty for none. Layouts are those of the codecs in `quant`.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.affine_search import fit_affine
from pyinfer.convert.codes import write_affine_codes
from pyinfer.convert.half_float import store_half
from pyinfer.convert.importance import weigh_block
from pyinfer.convert.jit import compiled

_BLOCK = 256


@compiled
def encode_q2_k(x, columns, out):  # type: ignore[no-untyped-def]
    w, wx = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    scales, minimums, codes = np.empty((2, 16), np.uint8), np.empty((2, 16), np.uint8), np.empty(_BLOCK, np.uint8)
    for row in range(len(x)):
        for b in range(x.shape[1] // _BLOCK):
            block, to = x[row, b * _BLOCK : (b + 1) * _BLOCK], out[row, b * 84 : (b + 1) * 84]
            weigh_block(block, columns, b * _BLOCK, 16, w, wx)
            d, dmin = fit_affine(block, w, wx, 16, np.float32(3), np.float32(15), 4, scales, minimums)
            _write_codes(block, 16, np.float32(3), d, dmin, scales[0], minimums[0], codes)
            for g in range(16):
                to[g] = scales[0, g] | (minimums[0, g] << 4)
            for half in range(2):
                for i in range(32):
                    k = 128 * half + i
                    pairs = codes[k] | (codes[k + 32] << 2) | (codes[k + 64] << 4) | (codes[k + 96] << 6)
                    to[16 + 32 * half + i] = pairs
            store_half(to, 80, d)
            store_half(to, 82, dmin)


@compiled
def encode_q4_k(x, columns, out):  # type: ignore[no-untyped-def]
    _encode_nibbles_k(x, columns, np.float32(15), 144, 16, out)


@compiled
def encode_q5_k(x, columns, out):  # type: ignore[no-untyped-def]
    _encode_nibbles_k(x, columns, np.float32(31), 176, 48, out)


@compiled
def _encode_nibbles_k(x, columns, top, block_bytes, nibbles_at, out):  # type: ignore[no-untyped-def]
    w, wx = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    scales, minimums, codes = np.empty((2, 8), np.uint8), np.empty((2, 8), np.uint8), np.empty(_BLOCK, np.uint8)
    for row in range(len(x)):
        for b in range(x.shape[1] // _BLOCK):
            block, to = x[row, b * _BLOCK : (b + 1) * _BLOCK], out[row, b * block_bytes : (b + 1) * block_bytes]
            weigh_block(block, columns, b * _BLOCK, 32, w, wx)
            d, dmin = fit_affine(block, w, wx, 32, top, np.float32(63), 3, scales, minimums)
            _write_codes(block, 32, top, d, dmin, scales[0], minimums[0], codes)
            store_half(to, 0, d)
            store_half(to, 2, dmin)
            for k in range(4):
                scale, low = scales[0, k + 4], minimums[0, k + 4]
                to[4 + k] = scales[0, k] | ((scale >> 4) << 6)
                to[8 + k] = minimums[0, k] | ((low >> 4) << 6)
                to[12 + k] = (scale & 15) | ((low & 15) << 4)
            if nibbles_at == 48:
                for i in range(32):
                    fifths = np.uint8(0)
                    for g in range(8):
                        fifths |= (codes[32 * g + i] >> 4) << g
                    to[16 + i] = fifths
            for run in range(4):
                for i in range(32):
                    k = 64 * run + i
                    to[nibbles_at + 32 * run + i] = (codes[k] & 15) | ((codes[k + 32] & 15) << 4)


@compiled
def _write_codes(x, group, top, d, dmin, scales, minimums, codes):  # type: ignore[no-untyped-def]
    for g in range(x.size // group):
        scale, low = d * np.float32(scales[g]), dmin * np.float32(minimums[g])
        write_affine_codes(x, g * group, (g + 1) * group, top, scale, low, codes)
