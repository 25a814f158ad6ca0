"""The matrices of a layer's experts, which a checkpoint stores one by one, as the single tensor that a GGUF has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyinfer.convert.safetensors import StoredTensor
from pyinfer.errors import ConvertError
from pyinfer.quant.codec import ByteArray, Codec, FloatArray


@dataclass(frozen=True)
class StackedTensor:
    """Parts of one shape and type, read like a `StoredTensor` of one more dimension; only the rows asked for are read."""

    name: str  # for messages
    parts: tuple[StoredTensor, ...]

    @classmethod
    def of(cls, name: str, parts: Sequence[StoredTensor]) -> StackedTensor:
        """ConvertError if the parts differ."""
        first = parts[0]
        for part in parts[1:]:
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise ConvertError(
                    f"{part.path.name}: tensor {part.name} is {part.dtype} {part.shape}, and {first.name} is "
                    f"{first.dtype} {first.shape}; experts must be alike"
                )
        return cls(name, tuple(parts))

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def codec(self) -> Codec:
        return self.parts[0].codec

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def read(self, first: int = 0, stop: int | None = None) -> ByteArray:
        """Bytes (rows, bytes a row) of the rows from `first` to before `stop`, counted through all parts."""
        stop = self.n_rows if stop is None else stop
        rows = self.parts[0].n_rows
        pieces = [
            self.parts[part].read(max(0, first - part * rows), min(rows, stop - part * rows))
            for part in range(first // rows, -(-stop // rows))
        ]
        return np.concatenate(pieces)

    def dequantize(self, first: int = 0, stop: int | None = None) -> FloatArray:
        """float32 (rows, columns) of the rows from `first` to before `stop`."""
        return self.codec.dequantize(self.read(first, stop))
