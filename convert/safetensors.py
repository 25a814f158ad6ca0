"""Reading safetensors files: 8 bytes of length, a JSON header, then the tensors' bytes.

Own reader because the package of that name gives NumPy no bfloat16, which most checkpoints are stored in. Rows are
read, not mapped, so that a file larger than memory costs no more than the rows in use. The format is specified in the
README of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyinfer.errors import ConvertError
from pyinfer.quant.codec import ByteArray, Codec, FloatArray
from pyinfer.quant.codecs import codec_by_name

_FLOATS = ("F32", "F16", "BF16")
_BYTES_OF_DTYPE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, the limit of the reference reader


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a checkpoint lies."""

    name: str
    path: Path
    dtype: str  # as safetensors spells it: 'BF16'
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def codec(self) -> Codec:
        """The codec of the same number format; ConvertError for integers and other floats."""
        if self.dtype not in _FLOATS:
            raise ConvertError(
                f"{self.path.name}: tensor {self.name} is stored as {self.dtype}; convert the checkpoint that holds "
                f"{', '.join(_FLOATS)} weights"
            )
        return codec_by_name(self.dtype)

    @property
    def n_rows(self) -> int:
        """All but the last dimension; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    def read(self, first: int = 0, stop: int | None = None) -> ByteArray:
        """Bytes (rows, bytes a row) of the rows from `first` to before `stop`, in native order."""
        stop = self.n_rows if stop is None else stop
        row_bytes = self.codec.row_bytes(self.columns)
        count = (stop - first) * row_bytes
        try:
            data = np.fromfile(self.path, np.uint8, count, offset=self.start + first * row_bytes)
        except OSError as error:
            raise ConvertError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if data.size != count:
            raise ConvertError(f"{self.path}: the file became shorter while it was read; fetch it again")
        return data.reshape(stop - first, row_bytes)

    def dequantize(self, first: int = 0, stop: int | None = None) -> FloatArray:
        """float32 (rows, columns) of the rows from `first` to before `stop`."""
        return self.codec.dequantize(self.read(first, stop))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their bytes; ConvertError if the file is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ConvertError(f"{path}: not a safetensors file, or cut off in its header; fetch it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConvertError(f"{path}: the safetensors header is damaged: {error}") from None
    if not isinstance(header, dict):
        raise ConvertError(f"{path}: the safetensors header is no JSON object")
    header.pop("__metadata__", None)
    tensors = [_stored(path, name, entry, 8 + length, size) for name, entry in header.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.start)}


def _stored(path: Path, name: str, entry: Any, origin: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError
        n_bytes = math.prod(shape) * _BYTES_OF_DTYPE.get(dtype, 0)
    except (KeyError, TypeError, ValueError):
        raise ConvertError(f"{path}: the safetensors header's entry of {name!r} is damaged: {entry!r}") from None
    if dtype in _BYTES_OF_DTYPE and end - begin != n_bytes:
        raise ConvertError(f"{path}: tensor {name!r} of {dtype} {shape} takes {n_bytes} bytes, not {end - begin}")
    if origin + end > size:
        raise ConvertError(
            f"{path}: cut off: tensor {name!r} ends at byte {origin + end}, the file at {size}; fetch it again"
        )
    return StoredTensor(name, path, dtype, tuple(shape), origin + begin)
