"""GGUF files, mapped into memory: metadata as Python values, tensors as views that cost nothing until they are read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from pyinfer.errors import GGUFError, ModelError
from pyinfer.quant.gguf_cursor import ByteOrder, Cursor, show
from pyinfer.quant.gguf_header import Header, read_header
from pyinfer.quant.mapping import Mapping
from pyinfer.quant.tensor import QuantTensor

T = TypeVar("T")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
NATIVE_ORDER: ByteOrder = "<" if sys.byteorder == "little" else ">"


class GGUFFile:
    """An open GGUF model, all its shards together. Use `GGUFFile.open`; tensors keep the mapping alive after `close`.

    `metadata` holds int, float, bool and str values, NumPy arrays of numbers in native order, `list[str]`, and lists of
    arrays. Bytes that are not UTF-8 are kept as surrogates (`surrogateescape`) in string arrays, else they are U+FFFD.
    Tensors of the machine's byte order are zero-copy; others are converted while opening.
    """

    def __init__(self, shards: list[tuple[Mapping, Header]]) -> None:
        self.path = shards[0][0].path
        self.size = sum(mapping.size for mapping, _ in shards)
        self.version = shards[0][1].version
        self.metadata: dict[str, Any] = shards[0][1].metadata
        self.tensors: dict[str, QuantTensor] = {}
        self._mappings = [mapping for mapping, _ in shards]
        for mapping, header in shards:
            _add_tensors(self.tensors, mapping, header)

    @property
    def identity(self) -> str:
        """The files with their sizes and times of change: equal while none was written again."""
        stats = [(mapping.path.resolve(), mapping.path.stat()) for mapping in self._mappings]
        return "; ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Open a file, or every shard of a split model given any of them; GGUFError says what is wrong and where."""
        path = Path(path)
        mapping, header = _open_one(path)
        count = header.metadata.get("split.count", 1)
        if type(count) is not int:
            raise GGUFError(f"{path}: metadata 'split.count' is {show(count)}, not a number")
        shards = [(mapping, header)] if count <= 1 else _open_shards(path, count)
        return cls(shards)

    def get(self, key: str, default: T) -> Any | T:
        """The metadata value of `key`, or `default`."""
        return self.metadata.get(key, default)

    def require(self, key: str, kind: type[T]) -> T:
        """The metadata value of `key` as int, float, str, bool or list; ModelError if it is missing or of another kind.

        An int serves as a float, and an array of numbers as a list.
        """
        if key not in self.metadata:
            raise ModelError(
                f"{self.path.name}: metadata has no {key!r}; was the file converted from a model of this kind?"
            )
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        elif kind is list and isinstance(value, np.ndarray):
            value = value.tolist()
        if type(value) is not kind:
            raise ModelError(f"{self.path.name}: metadata {key!r} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def close(self) -> None:
        """Let go of the mappings; arrays still in use keep theirs until they are gone."""
        self.tensors = {}
        for mapping in self._mappings:
            mapping.close()
        self._mappings = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_one(path: Path) -> tuple[Mapping, Header]:
    mapping = Mapping(path)
    return mapping, read_header(Cursor(mapping.buffer, path.name))


def _open_shards(path: Path, count: int) -> list[tuple[Mapping, Header]]:
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise GGUFError(f"{path}: 'split.count' is {count}, so the file's name must end in -00001-of-{count:05}.gguf")
    shards = []
    for number in range(count):
        shard = path.with_name(f"{match['stem']}-{number + 1:05}-of-{count:05}.gguf")
        if not shard.exists():
            raise GGUFError(f"{shard}: shard {number + 1} of {count} is missing; put all shards into one folder")
        mapping, header = _open_one(shard)
        for key, expected in (("split.no", number), ("split.count", count)):
            value = header.metadata.get(key)
            if type(value) is not int or value != expected:
                raise GGUFError(f"{shard}: metadata {key!r} is {show(value)}, expected {expected}")
        shards.append((mapping, header))
    found = sum(len(header.tensors) for _, header in shards)
    total = shards[0][1].metadata.get("split.tensors.count", found)
    if type(total) is not int or total != found:
        raise GGUFError(f"{path}: 'split.tensors.count' is {show(total)}, the {count} shards hold {found} tensors")
    return shards


def _add_tensors(tensors: dict[str, QuantTensor], mapping: Mapping, header: Header) -> None:
    for info in header.tensors:
        if info.name in tensors:
            raise GGUFError(f"{mapping.path}: tensor {show(info.name)} is in another shard too")
        row_bytes = info.codec.row_bytes(info.shape[-1])
        data = mapping.array[info.start : info.start + info.n_bytes].reshape(-1, row_bytes)
        if header.order == NATIVE_ORDER:
            tensors[info.name] = QuantTensor(info.name, info.codec, info.shape, data, mapping)
        else:
            tensors[info.name] = QuantTensor(info.name, info.codec, info.shape, info.codec.swap_bytes(data))
