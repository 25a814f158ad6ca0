"""Q4_0: d, 16 bytes of nibbles; d * (code - 8)."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, nibbles_16


class Q4_0(BlockSource):
    format = WeightFormat("Q4_0", bits=4, offset=8, block_bytes=18)
    d_at = 0

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        return nibbles_16(e, block, 2)
