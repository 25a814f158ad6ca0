"""Q4_K: 256 weights in 8 groups of 32, 6-bit scales and minimums, 4-bit codes; weight = d * sc * q - dmin * m."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, nibbles
from pyinfer.quant.k_scales import unpack_scales


class Q4_K(Codec):
    """Block: d f16 | dmin f16 | 12 bytes of scales and minimums | 128 bytes: runs of 32, low then high nibbles."""

    name, type_id, block_size, block_bytes = "Q4_K", 12, 256, 144
    wide_fields = ((0, 2, 2),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        scale_codes, minimum_codes = unpack_scales(blocks[:, 4:16])
        scales = half(blocks[:, :2]) * scale_codes.astype(np.float32)
        minimums = half(blocks[:, 2:4]) * minimum_codes.astype(np.float32)
        codes = nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32).astype(np.float32)
        return (scales[:, :, None] * codes - minimums[:, :, None]).reshape(-1, 256)
