"""How the Numba code of this folder is compiled: by `kernels_cpu.numba_code`, into the cache of kernels.

Entry functions take addresses and sizes, and nothing uses Numba's runtime: arrays are views, or lie on the stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

_njit: Any = njit  # it has one more option than its types say
compiled = _njit(error_model="numpy", _nrt=False)


def stack_array(dtype: type[np.generic], *shape: int) -> Any:
    """An intrinsic without arguments: an array of this shape, not cleared, that lasts until the caller returns."""
    kind = types.Array(from_dtype(np.dtype(dtype)), len(shape), "C")
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        words = ir.ArrayType(ir.IntType(64), -(-n_bytes // 8))
        place = cgutils.alloca_once(builder, words)
        return _array(context, builder, kind, place, [ir.Constant(ir.IntType(64), n) for n in shape])

    def on_stack(typingctx):  # type: ignore[no-untyped-def]
        return kind(), codegen

    return intrinsic(on_stack)


def _array(context: Any, builder: Any, kind: Any, place: Any, shape: Sequence[Any]) -> Any:
    array = make_array(kind)(context, builder)
    size = context.get_constant(types.intp, np.dtype(str(kind.dtype)).itemsize)
    strides = [size]
    for n in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], n))
    data = builder.bitcast(place, array.data.type)
    populate_array(array, data=data, shape=list(shape), strides=strides, itemsize=size, meminfo=None)
    return array._getvalue()


def _rows_at(dtype: type[np.generic]) -> Any:
    """An intrinsic: an array (n_rows, n_columns) at an address."""
    kind = types.Array(from_dtype(np.dtype(dtype)), 2, "C")

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return _array(context, builder, kind, builder.inttoptr(args[0], cgutils.voidptr_t), args[1:])

    def rows_at(typingctx, address, n_rows, n_columns):  # type: ignore[no-untyped-def]
        return kind(types.int64, types.int64, types.int64), codegen

    return intrinsic(rows_at)


float_rows_at, byte_rows_at = _rows_at(np.float32), _rows_at(np.uint8)
