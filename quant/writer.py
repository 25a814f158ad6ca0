"""Writing GGUF files, whole or not at all."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pyinfer.errors import GGUFError
from pyinfer.quant.codec import ByteArray
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.gguf import NATIVE_ORDER
from pyinfer.quant.gguf_cursor import ByteOrder
from pyinfer.quant.gguf_header import DEFAULT_ALIGNMENT
from pyinfer.quant.whole_file import whole_file, write_at

TensorSource = tuple[str, tuple[int, ...], ByteArray]  # codec name, row-major shape, bytes in native order

_KIND_OF_DTYPE = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7,
    "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorHeader:
    """What the beginning of a file says of a tensor."""

    codec: str
    shape: tuple[int, ...]  # row-major

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * codec_by_name(self.codec).row_bytes(self.shape[-1])


@dataclass(frozen=True)
class TensorStream(TensorHeader):
    """A tensor that is made while it is written, so that no more than one chunk of it is in memory."""

    chunks: Callable[[], Iterable[ByteArray]]  # consecutive whole blocks in native order, all of the tensor


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorSource],
    *,
    order: ByteOrder = NATIVE_ORDER,
    version: int = 3,
) -> None:
    """Write a GGUF file of tensors whose bytes are at hand; otherwise as `stream_gguf`."""

    def stream(codec: str, shape: tuple[int, ...], data: ByteArray) -> TensorStream:
        return TensorStream(codec, shape, lambda: (data,))

    streams = {name: stream(*source) for name, source in tensors.items()}
    stream_gguf(path, metadata, streams, order=order, version=version)


def stream_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorStream],
    *,
    order: ByteOrder = NATIVE_ORDER,
    version: int = 3,
    on_bytes: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a GGUF file that appears under `path` whole or not at all; tensors are made one chunk after the other.

    Metadata: bool, str, float (stored as float32), int (the first that holds it of uint32, int32, uint64, int64; in a
    list int32 is first), NumPy scalars and 1-D arrays (stored as what they are), and lists of these, all of one type.
    `on_bytes` is told the bytes of tensors written so far. GGUFError for values that no GGUF type holds and for
    chunks that do not sum up to the tensor's size.
    """
    done = 0
    with gguf_file(path, metadata, tensors, order=order, version=version) as (file, offsets):
        for name, tensor in tensors.items():
            codec, n_bytes = codec_by_name(tensor.codec), 0
            for chunk in tensor.chunks():
                data = np.ascontiguousarray(chunk if order == NATIVE_ORDER else codec.swap_bytes(chunk))
                write_at(file, data, offsets[name] + n_bytes)
                n_bytes += chunk.nbytes
                on_bytes(done + n_bytes)
            if n_bytes != tensor.n_bytes:
                raise GGUFError(
                    f"tensor {name!r}: {codec.name} of {tensor.shape} takes {tensor.n_bytes} bytes, not {n_bytes}"
                )
            done += n_bytes


@contextmanager
def gguf_file(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorHeader],
    *,
    order: ByteOrder = NATIVE_ORDER,
    version: int = 3,
) -> Iterator[tuple[BinaryIO, dict[str, int]]]:
    """A GGUF file, whole or not at all, and where in it each tensor's bytes belong: `write_at` puts them there.

    Metadata as `stream_gguf`. What nobody writes is zero.
    """
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    with whole_file(Path(path)) as file:
        file.write(_header(metadata, tensors, order, version, alignment))
        end = -(-file.tell() // alignment) * alignment
        offsets = {}
        for name, tensor in tensors.items():
            offsets[name] = end
            end += -(-tensor.n_bytes // alignment) * alignment
        file.truncate(end)
        yield file, offsets


def _header(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorHeader], order: ByteOrder, version: int, alignment: int
) -> bytes:
    parts = [b"GGUF", struct.pack(order + "IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, content = _value(order, value)
        parts += [_string(order, key), struct.pack(order + "I", kind), content]
    offset = 0
    for name, tensor in tensors.items():
        parts.append(_string(order, name))
        parts.append(struct.pack(f"{order}I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape)))
        parts.append(struct.pack(order + "IQ", codec_by_name(tensor.codec).type_id, offset))
        offset += -(-tensor.n_bytes // alignment) * alignment
    return b"".join(parts)


def _string(order: ByteOrder, text: str) -> bytes:
    return _strings(order, [text])


def _strings(order: ByteOrder, texts: list[str]) -> bytes:
    try:
        contents = list(map(str.encode, texts))
    except UnicodeEncodeError:  # bytes that are no UTF-8
        contents = [text.encode("utf-8", "surrogateescape") for text in texts]
    lengths = list(map(len, contents))
    packed = {n: struct.pack(order + "Q", n) for n in set(lengths)}
    parts = [b""] * (2 * len(texts))  # a vocabulary has 262,144 of these
    parts[::2], parts[1::2] = map(packed.__getitem__, lengths), contents
    return b"".join(parts)


def _value(order: ByteOrder, value: Any) -> tuple[int, bytes]:
    """(GGUF's value type, the bytes after it)."""
    if isinstance(value, str):
        return _STRING, _string(order, value)
    if isinstance(value, list | tuple):
        return _ARRAY, _list(order, list(value))
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, float):
        value = np.float32(value)
    elif isinstance(value, int):
        value = _integers([value], np.uint32, np.int32, np.uint64, np.int64)[0]
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.name not in _KIND_OF_DTYPE or value.ndim > 1:
        raise GGUFError(f"metadata of type {type(value).__name__} cannot be stored in a GGUF file")
    kind = _KIND_OF_DTYPE[value.dtype.name]
    content = np.asarray(value).astype(value.dtype.newbyteorder(order)).tobytes()
    if value.ndim == 0:
        return kind, content
    return _ARRAY, struct.pack(order + "IQ", kind, value.size) + content


def _list(order: ByteOrder, items: list[Any]) -> bytes:
    """An array's item type, length and items. Plain numbers share one type; an empty list is stored as int32."""
    if items and all(type(item) is str for item in items):  # a vocabulary: worth a short way
        return struct.pack(order + "IQ", _STRING, len(items)) + _strings(order, items)
    if items and all(type(item) is int for item in items):
        return _value(order, _integers(items, np.int32, np.uint32, np.int64, np.uint64))[1]
    if items and all(type(item) in (int, float) for item in items):
        return _value(order, np.array(items, np.float32))[1]
    values = [_value(order, item) for item in items]
    kinds = {kind for kind, _ in values} or {_KIND_OF_DTYPE["int32"]}
    if len(kinds) > 1:
        raise GGUFError(f"a metadata list mixes {sorted({type(item).__name__ for item in items})}")
    return struct.pack(order + "IQ", kinds.pop(), len(items)) + b"".join(content for _, content in values)


def _integers(numbers: list[int], *dtypes: type[np.integer[Any]]) -> npt.NDArray[Any]:
    """The numbers in the first of `dtypes` that holds them all."""
    for dtype in dtypes:
        limits = np.iinfo(dtype)
        if limits.min <= min(numbers) and max(numbers) <= limits.max:
            return np.array(numbers, dtype)
    raise GGUFError(f"metadata integers {min(numbers)}..{max(numbers)} do not fit 64 bits")
