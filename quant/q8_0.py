"""Q8_0: 32 weights, float16 scale, signed bytes; weight = d * q."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes
from pyinfer.quant.legacy_search import inverse


class Q8_0(Codec):
    """Block: d f16 | 32 int8."""

    name, type_id, block_size, block_bytes = "Q8_0", 8, 32, 34
    wide_fields = ((0, 2, 1),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        return half(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        scale = np.abs(weights).max(axis=-1, keepdims=True) / np.float32(127)
        scaled = weights * inverse(scale)
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        codes = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))  # halves go away from zero, as C's roundf
        return np.concatenate([half_bytes(scale), codes.astype(np.int8).view(np.uint8)], axis=-1)
