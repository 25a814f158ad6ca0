"""The memory of the KV pages: one K and one V pool for each layer of a page, touched only where a page is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import PageData, StageConfig, split_kv_dtype
from pyinfer.graph.graph import Graph
from pyinfer.kernels_cpu.kv_format import POSITIONS, kv_format
from pyinfer.kernels_cpu.memory import address, allocate


class KVPages:
    """Pools [n_pages, page bytes] in the layout of `kv_format`; layers of different groups share one (`kv_places`)."""

    def __init__(self, graph: Graph, config: StageConfig) -> None:
        self._keys: list[npt.NDArray[np.uint8]] = []
        self._values: list[npt.NDArray[np.uint8]] = []
        self._places = graph.kv_places
        for layer in graph.page_layers:
            blocks = layer.n_kv_heads * config.block_size // POSITIONS
            for pools, dtype in zip((self._keys, self._values), split_kv_dtype(config.kv_dtype), strict=True):
                page = blocks * kv_format(dtype, layer.head_dim).block_bytes(layer.head_dim)
                pools.append(allocate(config.n_pages * page).reshape(config.n_pages, page))

    def key_address(self, layer: int) -> int:
        return address(self._keys[self._places[layer][1]])

    def value_address(self, layer: int) -> int:
        return address(self._values[self._places[layer][1]])

    def copy(self, source: int, target: int) -> None:
        for pool in (*self._keys, *self._values):
            pool[target] = pool[source]

    def read(self, pages: Sequence[int]) -> PageData:
        """uint8 [n, bytes of a page]."""
        data = np.empty((len(pages), sum(pool.shape[1] for pool in (*self._keys, *self._values))), np.uint8)
        for pool, part in self._parts(data):
            part[:] = pool[list(pages)]
        return data

    def write(self, pages: Sequence[int], data: PageData) -> None:
        for pool, part in self._parts(data):
            pool[list(pages)] = part

    def _parts(self, data: PageData) -> Iterator[tuple[PageData, PageData]]:
        """Each pool with its columns of `data`."""
        start = 0
        for pool in (*self._keys, *self._values):
            end = start + pool.shape[1]
            yield pool, data[:, start:end]
            start = end
