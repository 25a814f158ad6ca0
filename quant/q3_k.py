"""Q3_K: 256 weights in 16 groups of 16, 6-bit signed scales, 3-bit codes; weight = d * (sc - 32) * (q - 4)."""

from __future__ import annotations

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray, half, half_bytes
from pyinfer.quant.k_search import fit_signed
from pyinfer.quant.q2_k import bit_pairs, pack_bit_pairs


class Q3_K(Codec):
    """Block: 32 bytes of third bits, bit i for weights 32i.. | 64 bytes of bit pairs as in Q2_K | 12 of scales | d f16.

    Scales: low nibbles of 0..7, then of 8..15, in bytes 0..7; the high two bits of scale 4k+j in bits 2k.. of byte 8+j.
    """

    name, type_id, block_size, block_bytes = "Q3_K", 11, 256, 110
    wide_fields = ((108, 2, 1),)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        high = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
        codes = bit_pairs(blocks[:, 32:96]) | (high.reshape(-1, 256) << 2)
        signed = codes.astype(np.float32) - np.float32(4)
        scales = half(blocks[:, 108:110]) * (unpack_q3_scales(blocks[:, 96:108]).astype(np.float32) - np.float32(32))
        weights: FloatArray = scales[:, :, None] * signed.reshape(-1, 16, 16)
        return weights.reshape(-1, 256)

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        fit = fit_signed(weights, group=16, zero=4, scale_low=-32, steps=9)
        high = np.packbits((fit.codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
        scales = pack_q3_scales((fit.scales + np.float32(32)).astype(np.uint8))
        return np.concatenate([high, pack_bit_pairs(fit.codes & np.uint8(3)), scales, half_bytes(fit.d)], axis=-1)


def unpack_q3_scales(packed: ByteArray) -> ByteArray:
    """Scales (n, 16), 0..63 with 32 meaning zero, of bytes (n, 12)."""
    low = np.concatenate([packed[:, :8] & 0x0F, packed[:, :8] >> 4], axis=-1)
    high = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales: ByteArray = low | (high.reshape(-1, 16) << 4)
    return scales


def pack_q3_scales(scales: ByteArray) -> ByteArray:
    """The inverse of `unpack_q3_scales`."""
    low = (scales[:, :8] & np.uint8(0x0F)) | (scales[:, 8:] << np.uint8(4))
    pairs = (scales >> np.uint8(4)).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.concatenate([low, np.bitwise_or.reduce(pairs, axis=1)], axis=-1)
