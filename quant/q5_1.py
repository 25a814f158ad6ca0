"""Q5_1: 32 weights, float16 scale and minimum, 5-bit codes; weight = d * q + m."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes, nibbles, pack_nibbles
from pyinfer.quant.legacy_search import affine_codes, high_bits, pack_high_bits


class Q5_1(Codec):
    """Block: d f16 | m f16 | uint32 of fifth bits, bit i of weight i | 16 bytes of nibbles as in Q4_1."""

    name, type_id, block_size, block_bytes = "Q5_1", 7, 32, 24
    wide_fields = ((0, 2, 2), (4, 4, 1))

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        codes = nibbles(blocks[:, 8:], 16) | (high_bits(blocks[:, 4:8]) << 4)
        return half(blocks[:, :2]) * codes.astype(np.float32) + half(blocks[:, 2:4])

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        scale, low, codes = affine_codes(weights, 31)
        nibble_bytes = pack_nibbles(codes & np.uint8(0x0F), 16)
        return np.concatenate([half_bytes(scale), half_bytes(low), pack_high_bits(codes), nibble_bytes], axis=-1)
