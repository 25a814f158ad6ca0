"""Q2_K, Q4_K and Q5_K: search and packing in one pass, as Numba code.

Every `encode_*` takes addresses: of float32 x (n_rows, n_columns), of float32 importances (n_columns,) or 0 for none, and
of the bytes to be filled. Layouts are those of the codecs in `quant`.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.affine_search import fit_affine
from pyinfer.convert.codes import write_affine_codes
from pyinfer.convert.half_float import store_half
from pyinfer.convert.importance import weigh_block
from pyinfer.convert.jit import byte_rows_at, compiled, float_rows_at, stack_array

_BLOCK = 256
_w_array, _wx_array = stack_array(np.float32, _BLOCK), stack_array(np.float32, _BLOCK)
_codes_array, _scales_16, _minimums_16, _scales_8, _minimums_8 = (
    stack_array(np.uint8, *shape) for shape in ((_BLOCK,), (2, 16), (2, 16), (2, 8), (2, 8))
)


@compiled
def encode_q2_k(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 84)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    w, wx, codes, scales, minimums = _w_array(), _wx_array(), _codes_array(), _scales_16(), _minimums_16()
    for row in range(len(x)):
        for b in range(x.shape[1] // _BLOCK):
            block, to = x[row, b * _BLOCK : (b + 1) * _BLOCK], out[row, b * 84 : (b + 1) * 84]
            weigh_block(block, columns, b * _BLOCK, 16, False, w, wx)
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
def encode_q4_k(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 144)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    _encode_nibbles_k(x, columns, np.float32(15), 144, 16, out)


@compiled
def encode_q5_k(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 176)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    _encode_nibbles_k(x, columns, np.float32(31), 176, 48, out)


@compiled
def _encode_nibbles_k(x, columns, top, block_bytes, nibbles_at, out):  # type: ignore[no-untyped-def]
    w, wx, codes, scales, minimums = _w_array(), _wx_array(), _codes_array(), _scales_8(), _minimums_8()
    for row in range(len(x)):
        for b in range(x.shape[1] // _BLOCK):
            block, to = x[row, b * _BLOCK : (b + 1) * _BLOCK], out[row, b * block_bytes : (b + 1) * block_bytes]
            weigh_block(block, columns, b * _BLOCK, 32, False, w, wx)
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
