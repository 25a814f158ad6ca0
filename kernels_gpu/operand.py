"""The forms in which rows lie on the device.

A `Value` of the graph that a matmul reads takes the form that suits the number of rows: float32, int8 blocks (`A8Rows`) or
float16 with a factor (`H16Rows`). Rows follow each other without gaps; `n_rows` is the bucket's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyinfer.kernels_gpu.launch import Buffer

Form = Literal["f32", "a8", "h16"]


@dataclass(frozen=True, slots=True)
class F32Rows:
    data: Buffer  # float32 [n_rows, width]
    n_rows: int
    width: int
    form: Form = "f32"


@dataclass(frozen=True, slots=True)
class A8Rows:
    """Rows as `graph.activation` specifies them, with what minimums are multiplied with."""

    codes: Buffer  # int8 [n_rows, width]
    scales: Buffer  # float32 [n_rows, width / 32]
    sums: Buffer  # float32 [n_rows, width / 32]: scale * sum of the block's codes
    n_rows: int
    width: int
    form: Form = "a8"


@dataclass(frozen=True, slots=True)
class H16Rows:
    """value = data * scale; the scale is a power of two."""

    data: Buffer  # float16 [n_rows, width]
    scales: Buffer  # float32 [n_rows]
    n_rows: int
    width: int
    form: Form = "h16"


Operand = F32Rows | A8Rows | H16Rows
