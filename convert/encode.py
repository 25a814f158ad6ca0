"""Rows of float32 weights to rows of quantized bytes, on all threads."""

from __future__ import annotations

from pyinfer.quant.codec import ByteArray, FloatArray
from pyinfer.quant.codecs import codec_by_name


def encode(codec_name: str, rows: FloatArray, weights: FloatArray | None = None) -> ByteArray:
    """Bytes uint8 (n, row bytes) of float32 (n, columns).

    `weights` are the importances (columns,) of the columns, larger for columns whose inputs are larger.
    """
    return codec_by_name(codec_name).quantize(rows)
