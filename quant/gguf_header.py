"""The header of one GGUF file: version, metadata and tensor table, all checked before anything uses them.

Format: ggml's `docs/gguf.md`, versions 2 and 3 (the same layout), in either byte order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyinfer.errors import ModelError
from pyinfer.quant.codec import Codec
from pyinfer.quant.codecs import codec_by_id
from pyinfer.quant.gguf_cursor import ByteOrder, Cursor, show

# Limits far above any real file, so that a corrupt count cannot cost seconds or gigabytes.
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_DIMS = 4
MAX_NESTED_ARRAYS = 65_536
MAX_ALIGNMENT = 65_536
DEFAULT_ALIGNMENT = 32

_ALIGNMENT_KEY = "general.alignment"
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.uint8), 1: np.dtype(np.int8), 2: np.dtype(np.uint16), 3: np.dtype(np.int16),
    4: np.dtype(np.uint32), 5: np.dtype(np.int32), 6: np.dtype(np.float32),
    10: np.dtype(np.uint64), 11: np.dtype(np.int64), 12: np.dtype(np.float64),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One line of the tensor table; its bytes are known to lie inside the file and to be nobody else's."""

    name: str
    codec: Codec
    shape: tuple[int, ...]  # row-major: the file's dimensions reversed
    start: int  # from the beginning of the file
    n_bytes: int
    at: int  # where in the file this line was, for messages


@dataclass(frozen=True)
class Header:
    version: int
    order: ByteOrder
    metadata: dict[str, Any]
    tensors: list[TensorInfo]  # in file order
    data_start: int


def read_header(cursor: Cursor) -> Header:
    """Read a header from the cursor's beginning; GGUFError for whatever is wrong with it."""
    magic = cursor.raw(4, "magic")
    if magic != b"GGUF":
        cursor.fail("magic", f"{magic!r} is not b'GGUF'; this is not a GGUF file", 0)
    version = cursor.u32("version")
    if version & 0xFFFF == 0:  # a small number read in the wrong order
        cursor.set_order(">")
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        cursor.fail("version", f"{version} is neither 2 nor 3; convert the model again with a current tool", 4)
    n_tensors = _count(cursor, "tensor count", MAX_TENSORS)
    n_keys = _count(cursor, "metadata count", MAX_KEYS)
    metadata = _read_metadata(cursor, n_keys)
    alignment = metadata.get(_ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    table = [_read_tensor_info(cursor, index) for index in range(n_tensors)]
    data_start = -(-cursor.offset // alignment) * alignment
    return Header(version, cursor.order, metadata, _place(cursor, table, data_start, alignment), data_start)


def _count(cursor: Cursor, what: str, limit: int) -> int:
    at = cursor.offset
    count = cursor.u64(what)
    if count > limit:
        cursor.fail(what, f"{count} is above the limit of {limit}", at)
    return count


def _read_metadata(cursor: Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(n_keys):
        at = cursor.offset
        key = cursor.name(f"metadata key {index}")
        if key in metadata:
            cursor.fail(f"metadata key {index}", f"{show(key)} appears twice", at)
        kind = cursor.u32(f"type of {show(key)}")
        value = _read_array(cursor, key, 0) if kind == _ARRAY else _read_scalar(cursor, key, kind)
        if key == _ALIGNMENT_KEY and not (
            type(value) is int and 8 <= value <= MAX_ALIGNMENT and value.bit_count() == 1
        ):
            cursor.fail(_ALIGNMENT_KEY, f"{show(value)} is no power of two in 8..{MAX_ALIGNMENT}", at)
        metadata[key] = value
    return metadata


def _read_scalar(cursor: Cursor, key: str, kind: int) -> int | float | bool | str:
    if kind == _STRING:
        return cursor.text(f"value of {show(key)}")
    at = cursor.offset
    if kind == _BOOL:
        byte = cursor.raw(1, f"value of {show(key)}")[0]
        if byte > 1:
            cursor.fail(f"value of {show(key)}", f"{byte} is not a bool (0 or 1)", at)
        return byte == 1
    if kind not in _NUMBERS:
        cursor.fail(f"type of {show(key)}", f"{kind} is not a GGUF value type", at - 4)
    value: int | float = cursor.numbers(_NUMBERS[kind], 1, f"value of {show(key)}")[0].item()
    return value


def _read_array(cursor: Cursor, key: str, depth: int) -> Any:
    what = f"array {show(key)}"
    at = cursor.offset
    kind, count = cursor.u32(f"item type of {what}"), cursor.u64(f"length of {what}")
    if kind == _STRING:
        return cursor.texts(count, what)
    if kind == _BOOL:
        flags = np.frombuffer(cursor.raw(count, what), np.uint8)
        if (flags > 1).any():
            cursor.fail(what, "holds a byte that is not a bool (0 or 1)", at)
        return flags.astype(np.bool_)
    if kind in _NUMBERS:
        return cursor.numbers(_NUMBERS[kind], count, what)
    if kind != _ARRAY:
        cursor.fail(f"item type of {what}", f"{kind} is not a GGUF value type", at)
    if depth or count > MAX_NESTED_ARRAYS:
        cursor.fail(
            what, f"holds {count} arrays at depth {depth + 1}; at most {MAX_NESTED_ARRAYS} at depth 1 are read", at
        )
    return [_read_array(cursor, f"{key}[{index}]", depth + 1) for index in range(count)]


def _read_tensor_info(cursor: Cursor, index: int) -> TensorInfo:
    """One line of the tensor table, with `start` still relative to the data and unchecked."""
    at = cursor.offset
    name = cursor.name(f"name of tensor {index}")
    n_dims = cursor.u32(f"dimension count of {show(name)}")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"dimension count of {show(name)}", f"{n_dims} is outside 1..{MAX_DIMS}", cursor.offset - 4)
    dims_at = cursor.offset
    dims = [cursor.u64(f"dimension {d} of {show(name)}") for d in range(n_dims)]
    codec = _read_codec(cursor, name)
    n_bytes = math.prod(dims) // codec.block_size * codec.block_bytes
    if min(dims) == 0:
        problem = f"{dims} holds a zero"
    elif dims[0] % codec.block_size:
        problem = f"rows of {dims[0]} weights are no multiple of {codec.name}'s block of {codec.block_size}"
    elif n_bytes > cursor.size:
        problem = f"{dims} of {codec.name} needs {n_bytes} bytes, the file has {cursor.size}"
    else:
        problem = ""
    if problem:
        cursor.fail(f"dimensions of {show(name)}", problem, dims_at)
    return TensorInfo(name, codec, tuple(reversed(dims)), cursor.u64(f"offset of {show(name)}"), n_bytes, at)


def _read_codec(cursor: Cursor, name: str) -> Codec:
    at = cursor.offset
    try:
        return codec_by_id(cursor.u32(f"type of {show(name)}"))
    except ModelError as error:
        cursor.fail(f"type of {show(name)}", str(error), at)


def _place(cursor: Cursor, table: list[TensorInfo], data_start: int, alignment: int) -> list[TensorInfo]:
    """Check names, alignment, bounds and overlap, and make `start` absolute."""
    tensors: dict[str, TensorInfo] = {}
    for info in table:
        start = data_start + info.start
        if info.name in tensors:
            cursor.fail("name of tensor", f"{show(info.name)} appears twice", info.at)
        if info.start % alignment:
            problem = f"{info.start} is no multiple of the alignment {alignment}"
            cursor.fail(f"offset of {show(info.name)}", problem, info.at)
        if start + info.n_bytes > cursor.size:
            problem = f"the tensor ends at {start + info.n_bytes}, the file at {cursor.size}; it is cut off or corrupt"
            cursor.fail(f"offset of {show(info.name)}", problem, info.at)
        tensors[info.name] = replace(info, start=start)
    for first, second in itertools.pairwise(sorted(tensors.values(), key=lambda t: t.start)):
        if first.start + first.n_bytes > second.start:
            cursor.fail(f"offset of {show(second.name)}", f"the tensor overlaps {show(first.name)}", second.at)
    return list(tensors.values())
