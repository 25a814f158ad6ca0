"""Q5_K: d, dmin, 8 six-bit (scale, minimum) pairs in 12 bytes, 32 bytes of fifth bits, 128 bytes of nibbles; sub-blocks of 32."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg
from pyinfer.kernels_cpu.weight_format import (
    BlockSource,
    WeightFormat,
    bytes_at,
    field_of,
    k4_scale_and_minimum,
    shift_left,
)


class Q5_K(BlockSource):
    format = WeightFormat("Q5_K", bits=5, columns=256, minimum="scaled", scales="u6u6", block_bytes=176)
    d_at = 0
    dm_at = 2

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        low = field_of(e, bytes_at(e, block, 48 + 32 * (j // 2), 32), 4 * (j % 2), 4)
        high = field_of(e, bytes_at(e, block, 16, 32), j, 1)
        return e.b.or_(low, shift_left(e, high, 4))

    def scale(self, e: Emitter, block: Reg, k: int) -> Reg:
        return k4_scale_and_minimum(e, block, 4, k)[0]

    def minimum(self, e: Emitter, block: Reg, k: int) -> Reg:
        return k4_scale_and_minimum(e, block, 4, k)[1]
