"""Q2_K: 16 (scale, minimum) nibble pairs, 64 bytes of 2-bit codes, d, dmin; sub-blocks of 16."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg, i8
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, byte_at, bytes_at, field_of


class Q2_K(BlockSource):
    format = WeightFormat("Q2_K", bits=2, columns=256, sub_block=16, minimum="scaled", scales="u4u4", block_bytes=84)
    d_at = 80
    dm_at = 82

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        return field_of(e, bytes_at(e, block, 16 + 32 * (j // 4), 32), 2 * (j % 4), 2)

    def scale(self, e: Emitter, block: Reg, k: int) -> Reg:
        return e.b.and_(byte_at(e, block, k), i8(15))

    def minimum(self, e: Emitter, block: Reg, k: int) -> Reg:
        return e.b.lshr(byte_at(e, block, k), i8(4))
