"""Q3_K and Q6_K: search and packing in one pass, as Numba code.

Arguments of every `encode_*` are those of `encode_affine`.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.codes import write_signed_codes
from pyinfer.convert.half_float import store_half
from pyinfer.convert.importance import weigh_block
from pyinfer.convert.jit import byte_rows_at, compiled, float_rows_at, stack_array
from pyinfer.convert.signed_search import fit_signed

_BLOCK = 256
_w_array, _wx_array = stack_array(np.float32, _BLOCK), stack_array(np.float32, _BLOCK)
_codes_array, _scales_array = stack_array(np.uint8, _BLOCK), stack_array(np.int8, 2, 16)


@compiled
def encode_q3_k(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 110)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    w, wx, codes, scales = _w_array(), _wx_array(), _codes_array(), _scales_array()
    for row in range(len(x)):
        for b in range(x.shape[1] // _BLOCK):
            block, to = x[row, b * _BLOCK : (b + 1) * _BLOCK], out[row, b * 110 : (b + 1) * 110]
            weigh_block(block, columns, b * _BLOCK, 16, True, w, wx)
            d = fit_signed(block, w, wx, 16, np.float32(4), np.float32(-32), 2, scales)
            _write_codes(block, 16, np.float32(4), d, scales[0], codes)
            for i in range(32):
                thirds = np.uint8(0)
                for g in range(8):
                    thirds |= (codes[32 * g + i] >> 2) << g
                to[i] = thirds
            for half in range(2):
                for i in range(32):
                    k = 128 * half + i
                    low, high = (codes[k] & 3) | ((codes[k + 32] & 3) << 2), codes[k + 64] & 3
                    to[32 + 32 * half + i] = low | (high << 4) | ((codes[k + 96] & 3) << 6)
            for j in range(4):
                pairs = np.uint8(0)
                for k in range(4):
                    pairs |= (np.uint8(scales[0, 4 * k + j] + 32) >> 4) << (2 * k)
                to[104 + j] = pairs
            for j in range(8):
                to[96 + j] = (np.uint8(scales[0, j] + 32) & 15) | ((np.uint8(scales[0, j + 8] + 32) & 15) << 4)
            store_half(to, 108, d)


@compiled
def encode_q6_k(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 210)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    w, wx, codes, scales = _w_array(), _wx_array(), _codes_array(), _scales_array()
    for row in range(len(x)):
        for b in range(x.shape[1] // _BLOCK):
            block, to = x[row, b * _BLOCK : (b + 1) * _BLOCK], out[row, b * 210 : (b + 1) * 210]
            weigh_block(block, columns, b * _BLOCK, 16, True, w, wx)
            d = fit_signed(block, w, wx, 16, np.float32(32), np.float32(-128), 3, scales)
            _write_codes(block, 16, np.float32(32), d, scales[0], codes)
            for half in range(2):
                for i in range(64):
                    k = 128 * half + i
                    to[64 * half + i] = (codes[k] & 15) | ((codes[k + 64] & 15) << 4)
                for i in range(32):
                    k = 128 * half + i
                    low, high = (codes[k] >> 4) | ((codes[k + 32] >> 4) << 2), codes[k + 64] >> 4
                    to[128 + 32 * half + i] = low | (high << 4) | ((codes[k + 96] >> 4) << 6)
            for g in range(16):
                to[192 + g] = np.uint8(scales[0, g])
            store_half(to, 208, d)


@compiled
def _write_codes(x, group, zero, d, scales, codes):  # type: ignore[no-untyped-def]
    for g in range(x.size // group):
        write_signed_codes(x, g * group, (g + 1) * group, zero, d * np.float32(scales[g]), codes)
