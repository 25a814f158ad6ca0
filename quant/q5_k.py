"""Q5_K: 256 weights in 8 groups of 32, 6-bit scales and minimums, 5-bit codes; weight = d * sc * q - dmin * m."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, nibbles
from pyinfer.quant.k_scales import unpack_scales


class Q5_K(Codec):
    """Block: d f16 | dmin f16 | 12 bytes of scales (Q4_K) | 32 of fifth bits, bit g for group g | 128 of nibbles."""

    name, type_id, block_size, block_bytes = "Q5_K", 13, 256, 176
    wide_fields = ((0, 2, 2),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        scale_codes, minimum_codes = unpack_scales(blocks[:, 4:16])
        scales = half(blocks[:, :2]) * scale_codes.astype(np.float32)
        minimums = half(blocks[:, 2:4]) * minimum_codes.astype(np.float32)
        high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
        codes = (nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | (high << 4)).astype(np.float32)
        return (scales[:, :, None] * codes - minimums[:, :, None]).reshape(-1, 256)
