"""How a weight matrix lies in device memory: the parts of its blocks apart, so that a lane's loads are aligned and wide.

A row of a block type is cut into units of 32 columns, and padded with zeros to a multiple of 8 units. Each part holds its bytes
of unit (row * units of a row + unit), in that order and without gaps; the d of the K types, one for each 8 units, comes in rows
padded to a multiple of 16 bytes. So every row of every part is a multiple of 16 bytes. Parts follow one another in the order of
the table, each at a multiple of 256 bytes. Their names are those of the members of `Parts` in `cuda/weight_*.cuh`.

| type | codes (bytes of a unit) | high | scales | d, per 8 units |
|---|---|---|---|---|
| Q4_0 | 16 nibbles, signed | | f16 d | |
| Q4_1 | 16 nibbles | | f16 d, f16 m | |
| Q5_0 | 16 nibbles | 4 bits, sign | f16 d | |
| Q5_1 | 16 nibbles | 4 bits | f16 d, f16 m | |
| Q8_0 | 32 int8 | | f16 d | |
| Q2_K | 8 pairs | | 2 bytes: minimum * 16 + scale of 16 columns | f16 d, f16 dmin |
| Q3_K | 8 pairs | 4 bits, sign | 2 int8, of 16 columns | f16 d |
| Q4_K | 16 nibbles | | | 16 bytes ("heads") |
| Q5_K | 16 nibbles | 4 bits | | 16 bytes ("heads") |
| Q6_K | 16 nibbles | 8 pairs, sign | 2 int8, of 16 columns | f16 d |

nibbles: byte i holds column i in its low and column 16 + i in its high nibble.
pairs: byte 4j + b holds columns 16j + 4i + b at bits 2i.
bits: bit g of byte b belongs to column 4g + b.
signed, sign: the code is two's complement, the value q minus the type's offset; the sign is in the part so marked.
heads: f16 d, f16 dmin, then three words with 4 bits for each of 8 units: the scales' low four bits; the minimums' low four
bits; the scale's high two bits below the minimum's.

F32, F16 and BF16 have one part, codes: rows as in the file, each padded with zeros to a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pyinfer.errors import ModelError
from pyinfer.quant.codec import ByteArray, nibbles, pack_nibbles
from pyinfer.quant.codecs import CODECS
from pyinfer.quant.k_scales import unpack_scales
from pyinfer.quant.q2_k import bit_pairs
from pyinfer.quant.q3_k import unpack_q3_scales
from pyinfer.quant.tensor import QuantTensor

UNIT = 32  # columns
PART_ALIGNMENT = 256
_WEIGHTS_PER_CHUNK = 1 << 19  # packed at a time, to bound temporary memory


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    offset: int  # bytes from the start of the weight
    row_bytes: int


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Where the parts of one matrix are."""

    kind: str  # the codec's name
    n_rows: int
    n_columns: int
    parts: tuple[Part, ...]
    n_bytes: int


def layout_of(kind: str, n_rows: int, n_columns: int) -> WeightLayout:
    """The layout of a matrix [n_rows, n_columns] of this type; ModelError for a type without a kernel or a broken row."""
    if kind in FLOAT_BYTES:
        sizes = {"codes": _whole(n_columns * FLOAT_BYTES[kind], 16)}
    elif kind in _TYPES:
        CODECS[kind].row_bytes(n_columns)
        sizes = {name: _whole(-(-n_columns // 256) * share, 16) for name, share in _TYPES[kind].parts.items()}
    else:
        raise ModelError(f"tensor type {kind} has no GPU kernel; known are {', '.join(KINDS)}")
    parts, end = [], 0
    for name, row_bytes in sizes.items():
        offset = _whole(end, PART_ALIGNMENT)
        parts.append(Part(name, offset, row_bytes))
        end = offset + n_rows * row_bytes
    return WeightLayout(kind, n_rows, n_columns, tuple(parts), end)


def pack(tensor: QuantTensor) -> Iterator[tuple[int, ByteArray]]:
    """Pieces of a matrix in its layout: (offset in the weight, bytes), from some rows of the tensor at a time."""
    n_rows, n_columns = tensor.data.shape[0], tensor.shape[-1]
    layout = layout_of(tensor.codec.name, n_rows, n_columns)
    step = max(1, _WEIGHTS_PER_CHUNK // n_columns)
    for first in range(0, n_rows, step):
        rows = tensor.data[first : first + step]
        for part, data in zip(layout.parts, _pack_rows(layout.kind, rows), strict=True):
            yield part.offset + first * part.row_bytes, _padded(data, part.row_bytes)


def _pack_rows(kind: str, rows: ByteArray) -> list[ByteArray]:
    """Each part's bytes of these rows, (n, bytes) without padding."""
    if kind in FLOAT_BYTES:
        return [rows]
    blocks = np.ascontiguousarray(rows).reshape(-1, CODECS[kind].block_bytes)
    return [data.reshape(len(rows), -1) for data in _TYPES[kind].split(blocks)]


def _padded(rows: ByteArray, row_bytes: int) -> ByteArray:
    if rows.shape[1] == row_bytes:
        return rows.reshape(-1)
    padded = np.zeros((len(rows), row_bytes), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(-1)


def _whole(n: int, step: int) -> int:
    """n rounded up to a multiple of `step`."""
    return -(-n // step) * step


# ---- blocks (n, block_bytes) to the parts of their units, each (n, bytes of a block)
def _q4_0(blocks: ByteArray) -> list[ByteArray]:
    return [blocks[:, 2:] ^ np.uint8(0x88), blocks[:, :2]]


def _q4_1(blocks: ByteArray) -> list[ByteArray]:
    return [blocks[:, 4:], blocks[:, :4]]


def _q5_0(blocks: ByteArray) -> list[ByteArray]:
    return [blocks[:, 6:], _spread_word(blocks[:, 2:6] ^ np.uint8(0xFF)), blocks[:, :2]]


def _q5_1(blocks: ByteArray) -> list[ByteArray]:
    return [blocks[:, 8:], _spread_word(blocks[:, 4:8]), blocks[:, :4]]


def _q8_0(blocks: ByteArray) -> list[ByteArray]:
    return [blocks[:, 2:], blocks[:, :2]]


def _q2_k(blocks: ByteArray) -> list[ByteArray]:
    return [_pairs(bit_pairs(blocks[:, 16:80])), blocks[:, :16], blocks[:, 80:84]]


def _q3_k(blocks: ByteArray) -> list[ByteArray]:
    scales = unpack_q3_scales(blocks[:, 96:108]) - np.uint8(32)
    return [_pairs(bit_pairs(blocks[:, 32:96])), _bits(~blocks[:, :32]), scales, blocks[:, 108:110]]


def _q4_k(blocks: ByteArray) -> list[ByteArray]:
    return [_regroup_nibbles(blocks[:, 16:144], 32), _heads(blocks)]


def _q5_k(blocks: ByteArray) -> list[ByteArray]:
    return [_regroup_nibbles(blocks[:, 48:176], 32), _bits(blocks[:, 16:48]), _heads(blocks)]


def _q6_k(blocks: ByteArray) -> list[ByteArray]:
    pairs = _pairs(bit_pairs(blocks[:, 128:192]) ^ np.uint8(2))
    return [_regroup_nibbles(blocks[:, :128], 64), pairs, blocks[:, 192:208], blocks[:, 208:210]]


def _heads(blocks: ByteArray) -> ByteArray:
    """The first 16 bytes of Q4_K and Q5_K with the scales' bits in the order in which lanes take them."""
    scales, minimums = unpack_scales(blocks[:, 4:16])
    high = (scales >> np.uint8(4)) | ((minimums >> np.uint8(4)) << np.uint8(2))
    fields = [values[:, ::2] | (values[:, 1::2] << np.uint8(4)) for values in (scales & 15, minimums & 15, high)]
    return np.concatenate([blocks[:, :4], *fields], axis=1)


def _regroup_nibbles(packed: ByteArray, run: int) -> ByteArray:
    """Nibbles in runs of `run` columns to units of 32: (n, m) to (n, m)."""
    codes = nibbles(packed, run)
    return pack_nibbles(codes.reshape(-1, UNIT), UNIT // 2).reshape(packed.shape)


def _pairs(codes: ByteArray) -> ByteArray:
    """Codes (n, 256) 0..3 to (n, 64)."""
    fields = codes.reshape(-1, 2, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: ByteArray = np.bitwise_or.reduce(fields, axis=2)
    return packed.reshape(len(codes), -1)


def _bits(packed: ByteArray) -> ByteArray:
    """Bit u of byte i is column i of unit u: (n, 32) to words of units, (n, 32)."""
    columns = (packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return _words(columns.reshape(-1, UNIT)).reshape(len(packed), -1)


def _spread_word(packed: ByteArray) -> ByteArray:
    """Bit i of a little-endian word is column i: (n, 4) to (n, 4)."""
    return _words(np.unpackbits(packed, axis=1, bitorder="little"))


def _words(columns: ByteArray) -> ByteArray:
    """Columns (n, 32) of 0 and 1 to (n, 4): bit g of byte b is column 4g + b."""
    return np.packbits(columns.reshape(-1, 8, 4), axis=1, bitorder="little").reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class _Type:
    parts: dict[str, int]  # bytes for each 256 columns
    split: Callable[[ByteArray], list[ByteArray]]


FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_TYPES = {
    "Q4_0": _Type({"codes": 128, "scales": 16}, _q4_0),
    "Q4_1": _Type({"codes": 128, "scales": 32}, _q4_1),
    "Q5_0": _Type({"codes": 128, "high": 32, "scales": 16}, _q5_0),
    "Q5_1": _Type({"codes": 128, "high": 32, "scales": 32}, _q5_1),
    "Q8_0": _Type({"codes": 256, "scales": 16}, _q8_0),
    "Q2_K": _Type({"codes": 64, "scales": 16, "d": 4}, _q2_k),
    "Q3_K": _Type({"codes": 64, "high": 32, "scales": 16, "d": 2}, _q3_k),
    "Q4_K": _Type({"codes": 128, "heads": 16}, _q4_k),
    "Q5_K": _Type({"codes": 128, "high": 32, "heads": 16}, _q5_k),
    "Q6_K": _Type({"codes": 128, "high": 64, "scales": 16, "d": 2}, _q6_k),
}
KINDS = (*FLOAT_BYTES, *_TYPES)
