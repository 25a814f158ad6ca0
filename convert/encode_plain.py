"""BF16 from float32 as Numba code: what the codec in `quant` does, at the speed of memory."""

from __future__ import annotations

import numpy as np

from pyinfer.convert.jit import compiled


@compiled
def encode_bf16(bits, out):  # type: ignore[no-untyped-def]
    """uint16 `out` of the float32 whose bits are uint32 `bits`, both flat: to nearest even, a NaN stays a NaN."""
    for i in range(bits.size):
        word = bits[i]
        rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (word >> np.uint32(16)) | np.uint32(0x40)
        is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = quiet if is_nan else rounded
