"""Q4_0: 32 weights, float16 scale, 4-bit codes; weight = d * (q - 8)."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes, nibbles, pack_nibbles
from pyinfer.quant.legacy_search import signed_codes


class Q4_0(Codec):
    """Block: d f16 | 16 bytes, low nibbles are weights 0..15, high nibbles 16..31."""

    name, type_id, block_size, block_bytes = "Q4_0", 2, 32, 18
    wide_fields = ((0, 2, 1),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        codes = nibbles(blocks[:, 2:], 16).astype(np.float32) - np.float32(8)
        return half(blocks[:, :2]) * codes

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        scale, codes = signed_codes(weights, 8)
        return np.concatenate([half_bytes(scale), pack_nibbles(codes, 16)], axis=-1)
