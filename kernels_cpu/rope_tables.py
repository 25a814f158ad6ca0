"""Tables of cosines and sines, one for each kind of rope in a graph, filled as far as positions have come."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyinfer.graph.rope import Rope
from pyinfer.kernels_cpu.memory import address, allocate

_STEP = 1024  # positions filled at a time


class RopeTables:
    """Float32 [n_ctx][2][n_dims/2] for each rope: cosines, then sines."""

    def __init__(self, n_ctx: int) -> None:
        self._n_ctx = -(-n_ctx // _STEP) * _STEP
        self._filled = 0
        self._tables: dict[int, tuple[Rope, npt.NDArray[np.float32]]] = {}

    def address(self, rope: Rope) -> int:
        if id(rope) not in self._tables:
            table = allocate(self._n_ctx * rope.n_dims * 4).view(np.float32).reshape(self._n_ctx, 2, rope.n_dims // 2)
            self._tables[id(rope)] = (rope, table)
        return address(self._tables[id(rope)][1])

    def cover(self, position: int) -> None:
        """Make sure that `position` and all before it are filled."""
        while self._filled <= position:
            span = np.arange(self._filled, self._filled + _STEP)
            for rope, table in self._tables.values():
                table[span] = rope.cos_sin(span).transpose(0, 2, 1)
            self._filled += _STEP
