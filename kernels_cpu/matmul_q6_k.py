"""Q6_K: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, d; d * scale * (code - 32), sub-blocks of 16."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, byte_at, bytes_at, field_of, shift_left


class Q6_K(BlockSource):
    format = WeightFormat("Q6_K", bits=6, columns=256, sub_block=16, offset=32, scales="i8", block_bytes=210)
    d_at = 208

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        half, quarter = j // 4, j % 4
        low = field_of(e, bytes_at(e, block, 64 * half + 32 * (quarter % 2), 32), 4 * (quarter // 2), 4)
        high = field_of(e, bytes_at(e, block, 128 + 32 * half, 32), 2 * quarter, 2)
        return e.b.or_(low, shift_left(e, high, 4))

    def scale(self, e: Emitter, block: Reg, k: int) -> Reg:
        return byte_at(e, block, 192 + k)
