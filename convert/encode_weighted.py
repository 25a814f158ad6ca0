"""Q4_0, Q4_1, Q5_0 and Q5_1 with an imatrix: search and packing in one pass, as Numba code.

Arguments of every `encode_*` are those of `encode_affine`.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.affine_search import search_affine
from pyinfer.convert.codes import store_nibbles, write_affine_codes, write_signed_codes
from pyinfer.convert.half_float import round_to_half, store_half
from pyinfer.convert.importance import mean_square, weigh_by_columns
from pyinfer.convert.jit import byte_rows_at, compiled, float_rows_at, stack_array
from pyinfer.convert.signed_search import search_signed

_BLOCK = 32
_w_array, _wx_array, _found_array = (stack_array(np.float32, n) for n in (_BLOCK, _BLOCK, 6))
_codes_array = stack_array(np.uint8, _BLOCK)


@compiled
def encode_q4_0(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 18)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    _encode(x, columns, 4, True, 18, out)


@compiled
def encode_q4_1(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 20)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    _encode(x, columns, 4, False, 20, out)


@compiled
def encode_q5_0(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 22)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    _encode(x, columns, 5, True, 22, out)


@compiled
def encode_q5_1(x_at, columns_at, out_at, n_rows, n_columns):  # type: ignore[no-untyped-def]
    x, out = float_rows_at(x_at, n_rows, n_columns), byte_rows_at(out_at, n_rows, n_columns // _BLOCK * 24)
    columns = float_rows_at(columns_at, 1, n_columns if columns_at else 0)[0]
    _encode(x, columns, 5, False, 24, out)


@compiled
def _encode(x, columns, bits, is_signed, block_bytes, out):  # type: ignore[no-untyped-def]
    w, wx, codes, found = _w_array(), _wx_array(), _codes_array(), _found_array()
    zero, top, answer = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1), found.ctypes.data
    for row in range(len(x)):
        typical = np.float32(4) * mean_square(x[row])
        for b in range(x.shape[1] // _BLOCK):
            first, stop = b * _BLOCK, (b + 1) * _BLOCK
            block, to = x[row, first:stop], out[row, b * block_bytes : (b + 1) * block_bytes]
            weigh_by_columns(block, columns[first:stop], typical, w, wx)
            at_w, at_wx = w.ctypes.data, wx.ctypes.data
            if is_signed:
                search_signed(block.ctypes.data, at_w, at_wx, 32, answer, zero)
                d = round_to_half(found[0])
                write_signed_codes(block, 0, 32, zero, d, codes)
                store_nibbles(codes, to, 2)
            else:
                search_affine(block.ctypes.data, at_w, at_wx, 32, answer, top)
                d, low = round_to_half(found[0]), round_to_half(found[1])
                write_affine_codes(block, 0, 32, top, d, low, codes)
                store_half(to, 2, -low)
                store_nibbles(codes, to, 4)
            store_half(to, 0, d)
