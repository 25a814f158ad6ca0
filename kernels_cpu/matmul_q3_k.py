"""Q3_K: 32 bytes of third bits, 64 bytes of 2-bit codes, 16 six-bit scales in 12 bytes, d; sub-blocks of 16."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg, i8
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, byte_at, bytes_at, field_of, shift_left


class Q3_K(BlockSource):
    format = WeightFormat("Q3_K", bits=3, columns=256, sub_block=16, offset=4, scales="i8", block_bytes=110)
    d_at = 108

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        low = field_of(e, bytes_at(e, block, 32 + 32 * (j // 4), 32), 2 * (j % 4), 2)
        high = field_of(e, bytes_at(e, block, 0, 32), j, 1)
        return e.b.or_(low, shift_left(e, high, 2))

    def scale(self, e: Emitter, block: Reg, k: int) -> Reg:
        b = e.b
        low = b.and_(b.lshr(byte_at(e, block, 96 + k % 8), i8(4 * (k // 8))), i8(15))
        high = b.and_(b.lshr(byte_at(e, block, 104 + k % 4), i8(2 * (k // 4))), i8(3))
        return b.sub(b.or_(low, b.shl(high, i8(4))), i8(32))
