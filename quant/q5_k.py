"""Q5_K: 256 weights in 8 groups of 32, 6-bit scales and minimums, 5-bit codes; weight = d * sc * q - dmin * m."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes, nibbles, pack_nibbles
from pyinfer.quant.k_scales import pack_scales, unpack_scales
from pyinfer.quant.k_search import fit_affine


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

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        fit = fit_affine(weights, group=32, top=31, scale_top=63, steps=10)
        scales = pack_scales(fit.scales, fit.minimums)
        high = np.packbits((fit.codes >> 4).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
        low = pack_nibbles(fit.codes & np.uint8(0x0F), 32)
        return np.concatenate([half_bytes(fit.d), half_bytes(fit.dmin), scales, high, low], axis=-1)
