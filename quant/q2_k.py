"""Q2_K: 256 weights in 16 groups of 16, 4-bit scales and minimums, 2-bit codes; weight = d * sc * q - dmin * m."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes
from pyinfer.quant.k_search import fit_affine


class Q2_K(Codec):
    """Block: 16 bytes, scale in the low, minimum in the high nibble | 64 bytes of bit pairs | d f16 | dmin f16."""

    name, type_id, block_size, block_bytes = "Q2_K", 10, 256, 84
    wide_fields = ((80, 2, 2),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        scales = half(blocks[:, 80:82]) * (blocks[:, :16] & 0x0F).astype(np.float32)
        minimums = half(blocks[:, 82:84]) * (blocks[:, :16] >> 4).astype(np.float32)
        codes = bit_pairs(blocks[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
        return (scales[:, :, None] * codes - minimums[:, :, None]).reshape(-1, 256)

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        fit = fit_affine(weights, group=16, top=3, scale_top=15, steps=10)
        packed_scales = fit.scales | (fit.minimums << np.uint8(4))
        codes = pack_bit_pairs(fit.codes)
        return np.concatenate([packed_scales, codes, half_bytes(fit.d), half_bytes(fit.dmin)], axis=-1)


def bit_pairs(packed: ByteArray) -> ByteArray:
    """Codes (n, 256) 0..3 of bytes (n, 64): each run of 32 bytes holds four runs of 32 codes, lowest bits first."""
    runs = packed.reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return ((runs >> shifts) & np.uint8(3)).reshape(-1, 256)


def pack_bit_pairs(codes: ByteArray) -> ByteArray:
    """The inverse of `bit_pairs`."""
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    packed: ByteArray = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << shifts, axis=2)
    return packed.reshape(-1, 64)
