"""Q6_K: 256 weights in 16 groups of 16, int8 scales, 6-bit codes; weight = d * sc * (q - 32)."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes, nibbles, pack_nibbles
from pyinfer.quant.k_search import fit_signed
from pyinfer.quant.q2_k import bit_pairs, pack_bit_pairs


class Q6_K(Codec):
    """Block: 128 bytes of nibbles in runs of 64 | 64 bytes of high bit pairs as in Q2_K | 16 int8 scales | d f16."""

    name, type_id, block_size, block_bytes = "Q6_K", 14, 256, 210
    wide_fields = ((208, 2, 1),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        codes = nibbles(blocks[:, :128], 64) | (bit_pairs(blocks[:, 128:192]) << 4)
        scales = half(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
        signed = (codes.astype(np.float32) - np.float32(32)).reshape(-1, 16, 16)
        return (scales[:, :, None] * signed).reshape(-1, 256)

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        fit = fit_signed(weights, group=16, zero=32, scale_low=-128, steps=9)
        low = pack_nibbles(fit.codes & np.uint8(0x0F), 64)
        high = pack_bit_pairs(fit.codes >> np.uint8(4))
        return np.concatenate([low, high, fit.scales.astype(np.int8).view(np.uint8), half_bytes(fit.d)], axis=-1)
