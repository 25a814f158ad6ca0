"""Q2_K, Q4_K and Q5_K, and Q4_1 and Q5_1 with an imatrix: search and packing in one pass, as Numba code.

Every `encode_*` fills uint8 `out` (rows, bytes a row) from float32 x (rows, columns); `columns` are the importances of
the columns, empty for none. Layouts are those of the codecs in `quant`.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.affine_search import fit_affine, search_finely
from pyinfer.convert.half_float import round_to_half, store_half
from pyinfer.convert.importance import mean_square, weigh_block, weigh_by_columns
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
            d, dmin = fit_affine(block, w, wx, 16, np.float32(3), np.float32(15), columns.size > 0, 4, scales, minimums)
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
            d, dmin = fit_affine(block, w, wx, 32, top, np.float32(63), columns.size > 0, 3, scales, minimums)
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
    """The codes that `affine_search` reckoned with: the same operations in the same order."""
    limit = top + np.float32(0.5)
    for g in range(x.size // group):
        scale, low = d * np.float32(scales[g]), dmin * np.float32(minimums[g])
        inverse = np.float32(1) / scale if scale > np.float32(1e-30) else np.float32(0)
        shift = low * inverse + np.float32(0.5)
        for i in range(g * group, (g + 1) * group):
            codes[i] = np.int32(max(min(x[i] * inverse + shift, limit), np.float32(0)))


@compiled
def encode_q4_1_weighted(x, columns, out):  # type: ignore[no-untyped-def]
    _encode_32(x, columns, np.float32(15), 20, out)


@compiled
def encode_q5_1_weighted(x, columns, out):  # type: ignore[no-untyped-def]
    _encode_32(x, columns, np.float32(31), 24, out)


@compiled
def _encode_32(x, columns, top, block_bytes, out):  # type: ignore[no-untyped-def]
    w, wx, found = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32), np.empty(4, np.float32)
    codes, one = np.empty(32, np.uint8), np.ones(1, np.uint8)
    for row in range(len(x)):
        weigh_by_columns(x[row], columns, np.float32(4) * mean_square(x[row]), w, wx)
        for b in range(x.shape[1] // 32):
            at, to = 32 * b, out[row, b * block_bytes : (b + 1) * block_bytes]
            block = x[row, at : at + 32]
            search_finely(
                block.ctypes.data, w.ctypes.data + 4 * at, wx.ctypes.data + 4 * at, 32, found.ctypes.data, top
            )  # fmt: skip
            d, low = round_to_half(found[0]), round_to_half(found[1])
            _write_codes(block, 32, top, d, low, one, one, codes)
            store_half(to, 0, d)
            store_half(to, 2, -low)
            store_nibbles(codes, to, 4)


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
