"""Q8_0: d, 32 signed bytes; stored as code = q + 128 so that the dot product's left side is unsigned."""

from __future__ import annotations

from pyinfer.kernels_cpu.simd import Emitter, Reg, i8
from pyinfer.kernels_cpu.weight_format import BlockSource, WeightFormat, bytes_at


class Q8_0(BlockSource):
    format = WeightFormat("Q8_0", bits=8, offset=128, block_bytes=34)
    d_at = 0

    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        return e.b.xor(bytes_at(e, block, 2, 32), e.const(i8, [-128] * 32))
