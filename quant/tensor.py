"""A quantized tensor: a codec and the bytes of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.quant.codec import ByteArray, Codec, FloatArray
from pyinfer.quant.mapping import Mapping


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """Rows of blocks; usually a read-only view on a mapped file."""

    name: str
    codec: Codec
    shape: tuple[int, ...]  # row-major, (rows, columns) for a matrix: GGUF's dimensions reversed
    data: ByteArray = field(repr=False)  # (product of all but the last dimension, bytes a row)
    mapping: Mapping | None = field(default=None, repr=False)  # the file that `data` looks into, if any

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    def dequantize(self, rows: slice | npt.NDArray[Any] | None = None) -> FloatArray:
        """float32 of `shape`, or (number of rows, columns) of the chosen rows."""
        if rows is None:
            return self.codec.dequantize(self.data).reshape(self.shape)
        return self.codec.dequantize(np.ascontiguousarray(self.data[rows]))

    def part(self, first: int, stop: int) -> QuantTensor:
        """The matrix of rows first..stop-1 of this one, on the same bytes and under the same name."""
        return replace(self, shape=(stop - first, self.shape[-1]), data=self.data[first:stop])

    def release(self) -> None:
        """Tell the OS that the mapped pages are not needed for now, as after a repack; the tensor stays readable."""
        if self.mapping is not None:
            self.mapping.release(self.data)
