"""Q5_0: 32 weights, float16 scale, 5-bit codes; weight = d * (q - 16)."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes, nibbles, pack_nibbles
from pyinfer.quant.legacy_search import high_bits, pack_high_bits, signed_codes


class Q5_0(Codec):
    """Block: d f16 | uint32 of fifth bits, bit i of weight i | 16 bytes of nibbles as in Q4_0."""

    name, type_id, block_size, block_bytes = "Q5_0", 6, 32, 22
    wide_fields = ((0, 2, 1), (2, 4, 1))

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        codes = nibbles(blocks[:, 6:], 16) | (high_bits(blocks[:, 2:6]) << 4)
        return half(blocks[:, :2]) * (codes.astype(np.float32) - np.float32(16))

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        scale, codes = signed_codes(weights, 16)
        return np.concatenate(
            [half_bytes(scale), pack_high_bits(codes), pack_nibbles(codes & np.uint8(0x0F), 16)], axis=-1
        )
