"""Q4_K: 256 weights in 8 groups of 32, 6-bit scales and minimums, 4-bit codes; weight = d * sc * q - dmin * m."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes, nibbles, pack_nibbles
from pyinfer.quant.k_scales import pack_scales, unpack_scales
from pyinfer.quant.k_search import fit_affine


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

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        fit = fit_affine(weights, group=32, top=15, scale_top=63, steps=10)
        scales = pack_scales(fit.scales, fit.minimums)
        return np.concatenate([half_bytes(fit.d), half_bytes(fit.dmin), scales, pack_nibbles(fit.codes, 32)], axis=-1)
