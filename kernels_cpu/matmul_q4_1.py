"""Q4_1: d, m, 16 bytes of nibbles; d * code + m."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, nibbles_16


class Q4_1(BlockSource):
    format = WeightFormat("Q4_1", bits=4, minimum="dm", block_bytes=20)
    d_at = 0
    dm_at = 2

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        return nibbles_16(e, block, 4)
