"""The "a8" format: an activation row as int8 codes with one float32 scale for each 32 columns.

This is the specification that kernels are checked against. For a block of 32 columns with amax = max|x|:
scale = amax / 127 and code = round-half-to-even(x * (127 / amax)), all in float32. A block with amax of at most 1e-30 is
zero: scale 0 and codes 0, because the reciprocal of a smaller one may overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 32  # columns that share a scale
_SMALLEST = np.float32(1e-30)
F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedActivation:
    """What a `Value` of dtype "a8" holds."""

    codes: npt.NDArray[np.int8]  # [rows, width]
    scales: F32Array  # [rows, width / 32]

    def dequantize(self) -> F32Array:
        """float32 [rows, width]: code * scale."""
        rows, width = self.codes.shape
        blocks = self.codes.reshape(rows, width // BLOCK, BLOCK).astype(np.float32)
        return (blocks * self.scales[:, :, None]).reshape(rows, width)


def quantize_activation(x: F32Array) -> QuantizedActivation:
    """Round float32 [rows, width], width a multiple of 32."""
    rows, width = x.shape
    assert width % BLOCK == 0, f"{width} columns are not whole blocks of {BLOCK}"
    blocks = x.reshape(rows, width // BLOCK, BLOCK)
    amax = np.abs(blocks).max(axis=2, initial=0)
    usable = amax > _SMALLEST
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=usable)
    codes = np.rint(blocks * inverse[:, :, None]).astype(np.int8)
    return QuantizedActivation(codes.reshape(rows, width), np.where(usable, amax / np.float32(127), np.float32(0)))
