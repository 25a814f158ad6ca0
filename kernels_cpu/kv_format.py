"""How keys and values lie in a page, and how one block of 16 positions of one head is written and read.

Keys are [head_dim][16 positions], so that scores need no horizontal sums; values are [16 positions][head_dim]. Q8_0 keeps
int8 codes with a float16 scale for each 32 columns of a position, after the codes: [head_dim/32][16] for keys,
[16][head_dim/32] for values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from pyinfer.errors import ConfigError
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i8, i16, i32, vector

POSITIONS = 16  # of a block
GROUP = 32  # columns that share a Q8_0 scale
F16_MAX = 65504.0


class KVFormat(ABC):
    """One element type of the cache. Pointers are to a block of 16 positions of one head."""

    name: str
    group: int | None = None  # columns that share a scale

    @abstractmethod
    def block_bytes(self, head_dim: int) -> int:
        """Bytes of 16 positions of one head, keys and values alike."""

    @abstractmethod
    def store_key(self, e: Emitter, row: Reg, block: Reg, position: Reg, head_dim: int) -> None:
        """Write a key, float32 [head_dim], as column `position` of the block."""

    @abstractmethod
    def store_value(self, e: Emitter, row: Reg, block: Reg, position: Reg, head_dim: int) -> None:
        """Write a value, float32 [head_dim], as row `position` of the block."""

    @abstractmethod
    def element_bytes(self) -> int:
        """Bytes of one code."""

    @abstractmethod
    def load(self, e: Emitter, pointer: Reg) -> Reg:
        """A vector of codes as floats."""


class PlainFormat(KVFormat):
    """F32, F16 and BF16: elements without scales."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self._size = name, size

    def element_bytes(self) -> int:
        return self._size

    def block_bytes(self, head_dim: int) -> int:
        return POSITIONS * head_dim * self._size

    def load(self, e: Emitter, pointer: Reg) -> Reg:
        if self.name == "f32":
            return e.load(pointer, e.vf, 4)
        if self.name == "f16":
            return e.load_halves(pointer)
        wide = e.b.zext(e.load(pointer, vector(i16, e.L), 2), e.vi)
        return e.b.bitcast(e.b.shl(wide, e.ints(16)), e.vf)

    def _narrow(self, e: Emitter, pointer: Reg) -> Reg:
        value = e.load(pointer, e.vf, 4)
        if self.name == "f32":
            return value
        if self.name == "bf16":
            return e.float_to_bfloat(value)
        # an infinity in a stale page would turn a masked 0 * V into NaN for another request
        value = e.fmin(e.fmax(value, e.floats(-F16_MAX)), e.floats(F16_MAX))
        return e.float_to_half(value)

    def store_key(self, e: Emitter, row: Reg, block: Reg, position: Reg, head_dim: int) -> None:
        target = e.at(block, e.mul(position, self._size))
        for d in range(0, head_dim, e.L):
            column = self._narrow(e, e.at(row, 4 * d))
            for j in range(e.L):
                place = e.at(target, (d + j) * POSITIONS * self._size)
                e.store(e.b.extract_element(column, i32(j)), place, self._size)

    def store_value(self, e: Emitter, row: Reg, block: Reg, position: Reg, head_dim: int) -> None:
        target = e.at(block, e.mul(position, head_dim * self._size))
        for d in range(0, head_dim, e.L):
            e.store(self._narrow(e, e.at(row, 4 * d)), e.at(target, d * self._size), self._size)


class Q8Format(KVFormat):
    """Q8_0: d = max|x| / 127 for each 32 columns, kept as float16."""

    name = "q8_0"
    group = GROUP

    def element_bytes(self) -> int:
        return 1

    def block_bytes(self, head_dim: int) -> int:
        return POSITIONS * (head_dim + 2 * (head_dim // GROUP))

    def load(self, e: Emitter, pointer: Reg) -> Reg:
        return e.to_float(e.b.sext(e.load(pointer, vector(i8, e.L)), e.vi))

    def _quantize(self, e: Emitter, row: Reg) -> tuple[list[Reg], Reg]:
        """(codes as <L x i8> vectors, scale as i16 bits) of 32 columns."""
        b = e.b
        values = [e.load(e.at(row, 4 * e.L * v), e.vf, 4) for v in range(GROUP // e.L)]
        largest = e.fabs(values[0])
        for value in values[1:]:
            largest = e.fmax(largest, e.fabs(value))
        limit = f32(127.0 * F16_MAX)
        amax = e.reduce_max(largest)
        amax = b.select(b.fcmp_ordered("<", amax, limit), amax, limit)
        usable = b.fcmp_ordered(">", amax, f32(1e-30))
        inverse = e.splat(b.select(usable, b.fdiv(f32(127.0), amax), f32(0.0)))
        codes = [b.trunc(e.round_to_int(b.fmul(value, inverse)), vector(i8, e.L)) for value in values]
        scale = b.select(usable, b.fdiv(amax, f32(127.0)), f32(0.0))
        return codes, b.extract_element(e.float_to_half(e.splat(scale, 4)), i32(0))

    def store_key(self, e: Emitter, row: Reg, block: Reg, position: Reg, head_dim: int) -> None:
        target = e.at(block, position)
        scales = e.at(e.at(block, POSITIONS * head_dim), e.mul(position, 2))
        for g in range(head_dim // GROUP):
            codes, scale = self._quantize(e, e.at(row, 4 * GROUP * g))
            for v, code in enumerate(codes):
                for j in range(e.L):
                    d = GROUP * g + v * e.L + j
                    e.store(e.b.extract_element(code, i32(j)), e.at(target, d * POSITIONS))
            e.store(scale, e.at(scales, 2 * POSITIONS * g), 2)

    def store_value(self, e: Emitter, row: Reg, block: Reg, position: Reg, head_dim: int) -> None:
        groups = head_dim // GROUP
        target = e.at(block, e.mul(position, head_dim))
        scales = e.at(e.at(block, POSITIONS * head_dim), e.mul(position, 2 * groups))
        for g in range(groups):
            codes, scale = self._quantize(e, e.at(row, 4 * GROUP * g))
            for v, code in enumerate(codes):
                e.store(code, e.at(target, GROUP * g + v * e.L))
            e.store(scale, e.at(scales, 2 * g), 2)


KV_FORMATS: dict[str, KVFormat] = {
    "f32": PlainFormat("f32", 4),
    "f16": PlainFormat("f16", 2),
    "bf16": PlainFormat("bf16", 2),
    "q8_0": Q8Format(),
}


def kv_format(name: str, head_dim: int) -> KVFormat:
    """The format called `name`; ConfigError when heads of this size cannot be kept in it."""
    found = KV_FORMATS[name]
    if found.group and head_dim % found.group:
        raise ConfigError(
            f"kv-cache-dtype {name} needs heads of a multiple of {found.group} columns; this model has {head_dim}: use f16"
        )
    return found
