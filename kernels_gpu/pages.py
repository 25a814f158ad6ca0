"""The memory of the KV pages on a device: for each place of a page one pool of keys and one of values.

A pool is [page][kv head][position][column]; Q8_0 has int8 codes there and a float16 scale for each 32 columns in a pool of its
own, [page][kv head][position][column / 32]. The layers in the same place of their KV groups share pools, as their pages differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import PageData, StageConfig, split_kv_dtype
from pyinfer.graph.graph import Graph, KVLayer
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer

_ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1}
_SCALE_BLOCK = 32
_MAX_BLOCK = 64
_STAGING = 32 << 20  # bytes of pinned memory that pages go through


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys or values of one place."""

    codes: Buffer
    scales: Buffer | None  # Q8_0 only
    codes_bytes: int  # of a page
    scales_bytes: int


@dataclass(frozen=True, slots=True)
class LayerPages:
    """What the kernels of one KV layer read and write."""

    keys: KVPool
    values: KVPool
    k_type: str
    v_type: str


class DevicePages:
    """Pools for `config.n_pages` pages. What is in them at first is undefined."""

    def __init__(self, device: Device, graph: Graph, config: StageConfig) -> None:
        if not 1 <= config.block_size <= _MAX_BLOCK:
            raise ConfigError(f"block size {config.block_size} is not 1 to {_MAX_BLOCK}, as GPU pages are")
        self._device, self._n_pages = device, config.n_pages
        self._types = split_kv_dtype(config.kv_dtype)
        self._places = graph.kv_places
        self._pools = [
            (self._pool(layer, self._types[0], config), self._pool(layer, self._types[1], config))
            for layer in graph.page_layers
        ]
        self.page_bytes = sum(size for _, size in self._parts())
        self._at_once = max(1, min(config.n_pages, _STAGING // max(1, self.page_bytes)))
        self._host = device.alloc_pinned(self._at_once * self.page_bytes)

    def _pool(self, layer: KVLayer, kind: str, config: StageConfig) -> KVPool:
        vectors = layer.n_kv_heads * config.block_size
        if kind == "q8_0" and layer.head_dim % _SCALE_BLOCK:
            raise ConfigError(
                f"kv-cache-dtype q8_0 needs heads of a multiple of {_SCALE_BLOCK} columns; this model has "
                f"{layer.head_dim}: use f16",
                param="kv_cache_dtype",
            )
        codes = vectors * layer.head_dim * _ELEMENT_BYTES[kind]
        scales = vectors * (layer.head_dim // _SCALE_BLOCK) * 2 if kind == "q8_0" else 0
        return KVPool(
            self._device.alloc(self._n_pages * codes),
            self._device.alloc(self._n_pages * scales) if scales else None,
            codes,
            scales,
        )

    def layer(self, layer: int) -> LayerPages:
        """The pools of a KV layer of the graph; its group's slots and tables say where in them."""
        keys, values = self._pools[self._places[layer][1]]
        return LayerPages(keys, values, *self._types)

    def group(self, layer: int) -> int:
        return self._places[layer][0]

    def _parts(self) -> Iterator[tuple[Buffer, int]]:
        """Every pool with its bytes of a page, in the order of `PageData`'s columns."""
        for pools in self._pools:
            for pool in pools:
                yield pool.codes, pool.codes_bytes
                if pool.scales is not None:
                    yield pool.scales, pool.scales_bytes

    def copy(self, source: int, target: int) -> None:
        for pool, size in self._parts():
            self._device.copy(pool.at(target * size, size), pool.at(source * size, size), size)

    def read(self, pages: Sequence[int]) -> PageData:
        """uint8 [n, page_bytes]."""
        data = np.empty((len(pages), self.page_bytes), np.uint8)
        for start, part in self._batches(pages):
            staged = self._host[: len(part) * self.page_bytes].reshape(len(part), self.page_bytes)
            for row, page in zip(staged, part, strict=True):
                for pool, size, column in self._columns():
                    self._device.download(pool, row[column : column + size], page * size)
            self._device.synchronize()
            data[start : start + len(part)] = staged
        return data

    def write(self, pages: Sequence[int], data: PageData) -> None:
        for start, part in self._batches(pages):
            staged = self._host[: len(part) * self.page_bytes].reshape(len(part), self.page_bytes)
            staged[:] = data[start : start + len(part)]
            for row, page in zip(staged, part, strict=True):
                for pool, size, column in self._columns():
                    self._device.upload(pool, row[column : column + size], page * size)
            self._device.synchronize()

    def _columns(self) -> Iterator[tuple[Buffer, int, int]]:
        column = 0
        for pool, size in self._parts():
            yield pool, size, column
            column += size

    def _batches(self, pages: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        for start in range(0, len(pages), self._at_once):
            yield start, pages[start : start + self._at_once]
