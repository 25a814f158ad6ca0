"""Q4_1: 32 weights, float16 scale and minimum, 4-bit codes; weight = d * q + m."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes, nibbles, pack_nibbles
from pyinfer.quant.legacy_search import affine_codes


class Q4_1(Codec):
    """Block: d f16 | m f16 | 16 bytes, low nibbles are weights 0..15, high nibbles 16..31."""

    name, type_id, block_size, block_bytes = "Q4_1", 3, 32, 20
    wide_fields = ((0, 2, 2),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        codes = nibbles(blocks[:, 4:], 16).astype(np.float32)
        return half(blocks[:, :2]) * codes + half(blocks[:, 2:4])

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        scale, low, codes = affine_codes(weights, 15)
        return np.concatenate([half_bytes(scale), half_bytes(low), pack_nibbles(codes, 16)], axis=-1)
