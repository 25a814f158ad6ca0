"""How a quantized weight lies in memory for the kernels: 16 rows interleaved, bytes in the order they are read.

A record holds 16 rows x `columns` (32, or 256 for the K types):

    d f16[16] | dm f16[16] (types with a minimum; zero for other K types) | scales [n_scales][16]
    | payload: for each 32 columns, `bits` vectors of 64 bytes

A unit is 4 consecutive columns of the 16 rows: byte 4r + j is column j of row r, so that one dword lane is one row. A plane of
w bits packs 8/w consecutive units into one 64-byte vector. Codes of 5, 6 and 3 bits use two planes (4+1, 4+2, 2+1); the
narrow one comes first, followed by the wide vectors that it completes. The weight is d * scale * code - minimum part.

Scales are "i8", one byte each; "u4u4", the scale in the low and the minimum in the high nibble; or "u6u6", which adds to the
same bytes, holding the low four bits of both, [n_scales/2][16] bytes with the high two: scale, minimum, and those of the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from pyinfer.kernels_cpu.simd import Emitter, Reg, f16, i8, i16, vector

ROWS = 16
PLANES = {2: (2,), 3: (1, 2), 4: (4,), 5: (1, 4), 6: (2, 4), 8: (8,)}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The shape of one block type's records.

    `offset` is subtracted from every code; `minimum` says how the other kind of minimum is stored: "dm" is an f16 added once
    (Q4_1, Q5_1), "scaled" an f16 times an integer for each sub-block, subtracted (Q2_K, Q4_K, Q5_K).
    """

    name: str
    bits: int
    columns: int = 32  # of a record
    sub_block: int = 32  # columns that share a scale
    offset: int = 0
    minimum: Literal["none", "dm", "scaled"] = "none"
    scales: Literal["none", "i8", "u4u4", "u6u6"] = "none"
    block_bytes: int = 0  # of the GGUF block, which has `columns` weights

    @property
    def n_scales(self) -> int:
        return 0 if self.scales == "none" else self.columns // self.sub_block

    @property
    def scales_at(self) -> int:
        return 64 if self.columns == 256 or self.minimum != "none" else 32

    @property
    def high_bits_at(self) -> int:
        return self.scales_at + self.n_scales * ROWS

    @property
    def payload_at(self) -> int:
        return self.high_bits_at + (self.n_scales // 2 * ROWS if self.scales == "u6u6" else 0)

    @property
    def record_bytes(self) -> int:
        return self.payload_at + self.columns // 32 * self.bits * 64


class BlockSource(ABC):
    """How to read one GGUF block, emitted as IR: one subclass a type, beside its `WeightFormat`."""

    format: WeightFormat
    d_at: int  # byte offsets in the block of the f16 scale and minimum
    dm_at: int | None = None

    @abstractmethod
    def codes(self, e: Emitter, block: Reg, j: int) -> Reg:
        """The 32 unsigned codes of columns 32j..32j+31, as <32 x i8>."""

    def scale(self, e: Emitter, block: Reg, k: int) -> Reg:
        """The integer scale of sub-block k (i8)."""
        raise AssertionError(self.format.name)

    def minimum(self, e: Emitter, block: Reg, k: int) -> Reg:
        """The integer minimum of sub-block k (i8)."""
        raise AssertionError(self.format.name)


# ---- pieces shared by the types' readers
def bytes_at(e: Emitter, pointer: Reg, offset: int, n: int) -> Reg:
    return e.load(e.at(pointer, offset), vector(i8, n))


def byte_at(e: Emitter, pointer: Reg, offset: int) -> Reg:
    return e.load(e.at(pointer, offset), i8)


def low_bits(e: Emitter, v: Reg, n: int) -> Reg:
    return e.b.and_(v, e.const(i8, [(1 << n) - 1] * v.type.count))


def shift_right(e: Emitter, v: Reg, n: int) -> Reg:
    return e.b.lshr(v, e.const(i8, [n] * v.type.count)) if n else v


def shift_left(e: Emitter, v: Reg, n: int) -> Reg:
    return e.b.shl(v, e.const(i8, [n] * v.type.count)) if n else v


def field_of(e: Emitter, v: Reg, at: int, n: int) -> Reg:
    """Bits at..at+n of every byte."""
    return low_bits(e, shift_right(e, v, at), n)


def nibbles_16(e: Emitter, block: Reg, offset: int) -> Reg:
    """Legacy order: 16 bytes, low nibbles are columns 0..15, high nibbles 16..31."""
    q = bytes_at(e, block, offset, 16)
    return e.shuffle(low_bits(e, q, 4), range(32), shift_right(e, q, 4))


def fifth_bits(e: Emitter, block: Reg, offset: int) -> Reg:
    """Bit i of a little-endian 32-bit word at byte i, moved to bit 4, as <32 x i8>."""
    word = bytes_at(e, block, offset, 4)
    spread = e.shuffle(word, [i // 8 for i in range(32)])
    bit = e.b.and_(spread, e.const(i8, [_signed(1 << i % 8) for i in range(32)]))
    is_set = e.b.icmp_unsigned("!=", bit, e.const(i8, [0] * 32))
    return e.b.select(is_set, e.const(i8, [16] * 32), e.const(i8, [0] * 32))


def k4_scale_and_minimum(e: Emitter, block: Reg, offset: int, k: int) -> tuple[Reg, Reg]:
    """Q4_K's and Q5_K's 6-bit pairs packed into 12 bytes."""
    b = e.b
    byte = lambda i: byte_at(e, block, offset + i)  # noqa: E731
    c = lambda v: i8(v)  # noqa: E731
    if k < 4:
        return b.and_(byte(k), c(63)), b.and_(byte(k + 4), c(63))
    low, high_s, high_m = byte(k + 4), byte(k - 4), byte(k)
    two = lambda v: b.shl(b.lshr(v, c(6)), c(4))  # noqa: E731
    return b.or_(b.and_(low, c(15)), two(high_s)), b.or_(b.lshr(low, c(4)), two(high_m))


def load_half_bits(e: Emitter, block: Reg, offset: int) -> Reg:
    return e.load(e.at(block, offset), i16)


def half_scalar(e: Emitter, block: Reg, offset: int) -> Reg:
    """One f16 as f32."""
    one = e.b.insert_element(e.const(i16, [0] * 4), load_half_bits(e, block, offset), e.const(i16, [0]).type.element(0))
    return e.b.extract_element(e.half_to_float(one), i16(0))


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


__all__ = ["PLANES", "ROWS", "BlockSource", "WeightFormat", "f16"]
