"""Q5_0: d, 32 fifth bits, 16 bytes of nibbles; d * (code - 16)."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, fifth_bits, nibbles_16


class Q5_0(BlockSource):
    format = WeightFormat("Q5_0", bits=5, offset=16, block_bytes=22)
    d_at = 0

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        return e.b.or_(nibbles_16(e, block, 6), fifth_bits(e, block, 2))
