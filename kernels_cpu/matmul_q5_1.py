"""Q5_1: d, m, 32 fifth bits, 16 bytes of nibbles; d * code + m."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, fifth_bits, nibbles_16


class Q5_1(BlockSource):
    format = WeightFormat("Q5_1", bits=5, minimum="dm", block_bytes=24)
    d_at = 0
    dm_at = 2

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        return e.b.or_(nibbles_16(e, block, 8), fifth_bits(e, block, 4))
