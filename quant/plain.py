"""Types that store every weight by itself: floats and integers, one weight a block."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pyinfer.quant.codec import ByteArray, Codec, FloatArray


class PlainCodec(Codec):
    """A NumPy dtype as a codec. Integers and float64 are rounded to float32 when they are dequantized."""

    block_size = 1
    dtype: ClassVar[np.dtype[np.generic]]

    def __init_subclass__(cls) -> None:
        cls.block_bytes = cls.dtype.itemsize
        cls.wide_fields = ((0, cls.block_bytes, 1),) if cls.block_bytes > 1 else ()

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        return blocks.view(self.dtype).astype(np.float32)


class F32(PlainCodec):
    name, type_id, dtype = "F32", 0, np.dtype(np.float32)

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        return weights.view(np.uint8)


class F16(PlainCodec):
    name, type_id, dtype = "F16", 1, np.dtype(np.float16)

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        with np.errstate(over="ignore"):
            return weights.astype(np.float16).view(np.uint8)


class BF16(PlainCodec):
    """The upper half of a float32, rounded to nearest even; a NaN stays a (quiet) NaN."""

    name, type_id, dtype = "BF16", 30, np.dtype(np.uint16)

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def _quantize_blocks(self, weights: FloatArray) -> ByteArray:
        bits = weights.view(np.uint32)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return np.where(is_nan, quiet_nan, rounded).astype(np.uint16).view(np.uint8)


class F64(PlainCodec):
    name, type_id, dtype = "F64", 28, np.dtype(np.float64)


class I8(PlainCodec):
    name, type_id, dtype = "I8", 24, np.dtype(np.int8)


class I16(PlainCodec):
    name, type_id, dtype = "I16", 25, np.dtype(np.int16)


class I32(PlainCodec):
    name, type_id, dtype = "I32", 26, np.dtype(np.int32)


class I64(PlainCodec):
    name, type_id, dtype = "I64", 27, np.dtype(np.int64)
