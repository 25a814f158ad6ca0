"""Weights on their way from a checkpoint to a GGUF: read, reordered, shifted and encoded, a chunk of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.convert.encode import transcode
from pyinfer.convert.safetensors import StoredTensor
from pyinfer.convert.stacked_tensor import StackedTensor
from pyinfer.errors import ConvertError
from pyinfer.quant.codec import ByteArray, Codec, FloatArray
from pyinfer.quant.codecs import codec_by_name

_CHUNK_WEIGHTS = 1 << 24  # 64 MB of float32
_F32 = codec_by_name("F32")


@dataclass(frozen=True)
class TensorSource:
    """Where the weights of one tensor of a GGUF come from, and how they change on the way."""

    shape: tuple[int, ...]  # in the GGUF; the first rows of what is stored
    stored: StoredTensor | StackedTensor | None = None
    order: npt.NDArray[np.int64] | None = None  # the stored row of every row
    offset: float = 0.0  # added to every weight
    values: FloatArray | None = None  # computed, if not stored

    def chunks(self, codec_name: str) -> Iterator[ByteArray]:
        """The tensor's bytes in the type `codec_name`, some rows at a time; ConvertError for weights that no file
        should hold.
        """
        if self.stored is None:
            assert self.values is not None and codec_name == "F32"
            yield self.values.reshape(-1, self.shape[-1]).view(np.uint8)
            return
        if len(self.shape) == 1:
            vector = self.stored.dequantize().ravel()[: self.shape[0]] + np.float32(self.offset)
            vector = vector if self.order is None else vector[self.order]
            yield _encoded(self.stored.name, _F32, vector[np.newaxis].view(np.uint8), codec_name)
            return
        n_rows = math.prod(self.shape[:-1])
        step = max(1, _CHUNK_WEIGHTS // self.shape[-1])
        for first in range(0, n_rows, step):
            yield self._rows(self.stored, codec_name, first, min(first + step, n_rows))

    def _rows(self, stored: StoredTensor | StackedTensor, codec_name: str, first: int, stop: int) -> ByteArray:
        if self.order is None:
            start, data = first, stored.read(first, stop)
        else:
            wanted = self.order[first:stop]
            start = int(wanted.min())
            data = stored.read(start, int(wanted.max()) + 1)[wanted - start]
        if self.offset:
            rows = stored.codec.dequantize(data) + np.float32(self.offset)
            return _encoded(stored.name, _F32, rows.view(np.uint8), codec_name)
        return _encoded(stored.name, stored.codec, data, codec_name)


def _encoded(name: str, source: Codec, data: ByteArray, codec_name: str) -> ByteArray:
    _check_finite(name, source, data)
    if source.name == codec_name:
        return data
    encoded = transcode(source, data, codec_name)
    if codec_name == "F16" and not np.isfinite(encoded.view(np.float16)).all():
        raise ConvertError(f"tensor {name} holds a weight beyond float16's 65504; choose --type bf16 or f32")
    return encoded


def _check_finite(name: str, codec: Codec, data: npt.NDArray[Any]) -> None:
    """A float is NaN or infinite if all bits of its exponent are set."""
    word, exponent = {"F32": ("u4", 0x7F800000), "BF16": ("u2", 0x7F80), "F16": ("u2", 0x7C00)}[codec.name]
    bits = data.view(word) & np.array(exponent, word)
    if bits.size and int(bits.max()) == exponent:
        raise ConvertError(f"tensor {name} holds a weight that is NaN or infinite; the checkpoint is damaged")
