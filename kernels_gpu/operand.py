"""The forms in which rows lie on the device.

A `Value` of the graph that a matmul reads takes the form that suits the number of rows: "f32" is float32; "a8" int8 in blocks
of 32 columns (`graph.activation`), the codes in the order of `cuda/a8.cuh`; "h16" float16 with a power of two for each row,
value = data * scale. Rows follow one another without gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyinfer.kernels_gpu.launch import Buffer

Form = Literal["f32", "a8", "h16"]
FORMS: tuple[Form, ...] = ("f32", "a8", "h16")  # by number, as the kernels' OUT counts them
_A8_BLOCK = 32
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows in one form."""

    form: Form
    width: int
    data: Buffer  # float32, int8 or float16 [n, width]
    scales: Buffer | None = None  # float32: a8 [n, width / 32], h16 [n] or None: all are `factor`
    sums: Buffer | None = None  # float32, a8 only [n, width / 32]: scale * sum of the block's codes
    factor: float = 1.0  # of h16 rows without scales: a power of two


def operand_bytes(form: Form, n_rows: int, width: int) -> int:
    """Memory that `operand_at` divides up."""
    return sum(_part_bytes(form, n_rows, width))


def operand_at(form: Form, n_rows: int, width: int, memory: Buffer) -> Operand:
    """An operand in this memory; its parts are multiples of 256 bytes apart."""
    parts, start = list[Buffer](), 0
    for n_bytes in _part_bytes(form, n_rows, width):
        parts.append(memory.at(start, n_bytes))
        start += n_bytes
    data, scales, sums, *_ = (*parts, None, None)
    assert data is not None
    return Operand(form, width, data, scales, sums)


def _part_bytes(form: Form, n_rows: int, width: int) -> list[int]:
    if form == "f32":
        sizes = [4 * n_rows * width]
    elif form == "a8":
        assert width % _A8_BLOCK == 0, f"{width} columns are not whole blocks of {_A8_BLOCK}"
        sizes = [n_rows * width, *[4 * n_rows * (width // _A8_BLOCK)] * 2]
    else:
        sizes = [2 * n_rows * width, 4 * n_rows]
    return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
