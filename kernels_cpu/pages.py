"""The memory of the KV pages: one K and one V pool a layer, touched only where a page is used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.kernels_cpu.kv_store import KV_BYTES
from pyinfer.kernels_cpu.memory import address, allocate


class KVPages:
    """Pools [n_pages, page bytes] in the layout of `kv_store`."""

    def __init__(self, graph: Graph, config: StageConfig) -> None:
        self._keys: list[npt.NDArray[np.uint8]] = []
        self._values: list[npt.NDArray[np.uint8]] = []
        for layer in graph.kv_layers:
            page = layer.n_kv_heads * layer.head_dim * config.block_size * KV_BYTES[config.kv_dtype]
            for pools in (self._keys, self._values):
                pools.append(allocate(config.n_pages * page).reshape(config.n_pages, page))

    def key_address(self, layer: int) -> int:
        return address(self._keys[layer])

    def value_address(self, layer: int) -> int:
        return address(self._values[layer])

    def copy(self, source: int, target: int) -> None:
        for pool in (*self._keys, *self._values):
            pool[target] = pool[source]
