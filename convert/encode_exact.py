"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 blocks without an imatrix, byte for byte what ggml writes; F16, BF16, F32.

The codecs in `quant` are the specification; this is the same in vector code, at the speed of memory. The compiler of the
CPU kernels compiles and keeps it: Numba alone would take longer to import than a small model to convert.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from llvmlite import ir

from pyinfer.kernels_cpu.compiler import N_ARGS, compiler_for
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i8, i16, i32, vector

_BLOCK = 32
_FLOATS, _INTS, _BYTES = vector(f32, _BLOCK), vector(i32, _BLOCK), vector(i8, _BLOCK)

Encode = Callable[[int, int, int], bool]  # addresses of the weights and of the bytes, number of blocks


class _Block:
    """One block of 32 weights in registers, and where its bytes go."""

    def __init__(self, e: Emitter, x: Reg, out: Reg) -> None:
        self.e, self.b, self.x, self.out = e, e.b, x, out

    def fold(self, combine: Callable[[Reg, Reg], Reg]) -> Reg:
        value, n = self.x, _BLOCK
        while n > 1:
            n //= 2
            value = combine(self.e.shuffle(value, range(n)), self.e.shuffle(value, range(n, 2 * n)))
        return self.b.extract_element(value, i32(0))

    def first_equal(self, value: Reg) -> Reg:
        """Index of the first weight that equals `value`, 32 if none does."""
        mask = self.b.bitcast(self.b.fcmp_ordered("==", self.x, self.e.splat(value, _BLOCK)), i32)
        return self.e.call("llvm.cttz.i32", i32, [mask, ir.Constant(ir.IntType(1), 0)])

    def inverse(self, scale: Reg) -> Reg:
        """1 / scale; 0 where that is infinite, for such a scale is 0 in float16 anyway."""
        result = self.b.fdiv(f32(1.0), scale)
        finite = self.b.fcmp_ordered("<", self.e.call("llvm.fabs.f32", f32, [result]), f32(float("inf")))
        return self.b.select(finite, result, f32(0.0))

    def store_half(self, value: Reg, at: int) -> None:
        kind = vector(f32, 1)
        single = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, i32(0))
        self.e.store(self.e.float_to_half(single), self.e.at(self.out, at), 1)

    def codes(self, scaled: Reg, top: int) -> Reg:
        """Bytes 0..top of numbers that already have the half added which rounds them."""
        limit, nothing = ir.Constant(_FLOATS, [float(top)] * _BLOCK), ir.Constant(_FLOATS, [0.0] * _BLOCK)
        clipped = self.e.fmax(self.e.fmin(scaled, limit), nothing)
        return self.b.trunc(self.b.fptosi(clipped, _INTS), _BYTES)

    def store_codes(self, codes: Reg, bits: int, at: int) -> None:
        """Nibbles, weights 0..15 low and 16..31 high; before them, of 5-bit codes, the fifth bits."""
        b, e = self.b, self.e
        if bits == 5:
            fifth = b.icmp_unsigned(">", codes, ir.Constant(_BYTES, [15] * _BLOCK))
            e.store(b.bitcast(fifth, i32), e.at(self.out, at), 1)
            codes, at = b.and_(codes, ir.Constant(_BYTES, [15] * _BLOCK)), at + 4
        half = vector(i8, 16)
        high = b.shl(e.shuffle(codes, range(16, 32)), ir.Constant(half, [4] * 16))
        e.store(b.or_(e.shuffle(codes, range(16)), high), e.at(self.out, at), 1)


def _signed(block: _Block, bits: int) -> None:
    """weight = scale * (code - zero); the weight of the largest magnitude gets code 0, of equal ones the first."""
    b, zero = block.b, 1 << (bits - 1)
    low, high = block.fold(block.e.fmin), block.fold(block.e.fmax)
    size = b.fneg(low)
    is_high = b.or_(
        b.fcmp_ordered(">", high, size),
        b.and_(
            b.fcmp_ordered("==", high, size),
            b.icmp_unsigned("<", block.first_equal(high), block.first_equal(low)),
        ),
    )
    extreme = b.select(is_high, high, low)
    extreme = b.select(b.fcmp_ordered("==", extreme, f32(0.0)), f32(0.0), extreme)
    scale = b.fdiv(extreme, f32(-float(zero)))
    scaled = b.fmul(block.x, block.e.splat(block.inverse(scale), _BLOCK))
    codes = block.codes(b.fadd(scaled, ir.Constant(_FLOATS, [zero + 0.5] * _BLOCK)), 2 * zero - 1)
    block.store_half(scale, 0)
    block.store_codes(codes, bits, 2)


def _affine(block: _Block, bits: int) -> None:
    """weight = scale * code + minimum."""
    b, top = block.b, (1 << bits) - 1
    low, high = block.fold(block.e.fmin), block.fold(block.e.fmax)
    is_constant = b.fcmp_ordered("==", low, high)
    low = b.extract_element(block.x, block.first_equal(low))  # a zero keeps the sign that the first one has
    scale = b.fdiv(b.select(is_constant, f32(0.0), b.fsub(high, low)), f32(float(top)))
    above = b.fsub(block.x, block.e.splat(low, _BLOCK))
    scaled = b.fmul(above, block.e.splat(block.inverse(scale), _BLOCK))
    codes = block.codes(b.fadd(scaled, ir.Constant(_FLOATS, [0.5] * _BLOCK)), top)
    block.store_half(scale, 0)
    block.store_half(low, 2)
    block.store_codes(codes, bits, 4)


def _bytes(block: _Block, bits: int) -> None:
    """weight = scale * code; halves are rounded away from zero, as C's roundf does."""
    b, e = block.b, block.e
    size = e.fmax(b.fneg(block.fold(e.fmin)), block.fold(e.fmax))
    scale = b.fdiv(e.call("llvm.fabs.f32", f32, [size]), f32(127.0))
    scaled = b.fmul(block.x, e.splat(block.inverse(scale), _BLOCK))
    whole = b.fptosi(scaled, _INTS)
    rest = b.fsub(scaled, b.sitofp(whole, _FLOATS))
    up = b.fcmp_ordered(">=", rest, ir.Constant(_FLOATS, [0.5] * _BLOCK))
    down = b.fcmp_ordered("<=", rest, ir.Constant(_FLOATS, [-0.5] * _BLOCK))
    rounded = b.add(whole, b.sub(b.zext(up, _INTS), b.zext(down, _INTS)))
    block.store_half(scale, 0)
    e.store(b.trunc(rounded, _BYTES), e.at(block.out, 2), 1)


def _halves(block: _Block, bits: int) -> None:
    """float16 of 32 weights, on a CPU that rounds them by itself: also infinities and NaN."""
    block.e.store(block.e.float_to_half(block.x), block.out, 1)


def _bfloats(block: _Block, bits: int) -> None:
    """bfloat16 of 32 weights, to nearest even; a NaN stays a NaN."""
    b, e = block.b, block.e
    upper = b.lshr(b.bitcast(block.x, _INTS), ir.Constant(_INTS, [16] * _BLOCK))
    quiet = b.trunc(b.or_(upper, ir.Constant(_INTS, [0x40] * _BLOCK)), vector(i16, _BLOCK))
    e.store(b.select(b.fcmp_unordered("uno", block.x, block.x), quiet, e.float_to_bfloat(block.x)), block.out, 1)


def _floats(block: _Block, bits: int) -> None:
    """The 32 weights themselves."""
    block.e.store(block.x, block.out, 1)


def _load(e: Emitter, source: str, at: Reg) -> Reg:
    """32 weights of a plain type."""
    if source == "F16":
        return e.load_halves(at, _BLOCK)
    if source == "BF16":
        upper = e.b.zext(e.load(at, vector(i16, _BLOCK), 2), _INTS)
        return e.b.bitcast(e.b.shl(upper, ir.Constant(_INTS, [16] * _BLOCK)), _FLOATS)
    return e.load(at, _FLOATS, 4)


# type -> what is emitted for a block, bits of a code, bytes of a block
_KINDS: dict[str, tuple[Callable[[_Block, int], None], int, int]] = {
    "Q4_0": (_signed, 4, 18),
    "Q4_1": (_affine, 4, 20),
    "Q5_0": (_signed, 5, 22),
    "Q5_1": (_affine, 5, 24),
    "Q8_0": (_bytes, 8, 34),
    "F16": (_halves, 16, 64),
    "BF16": (_bfloats, 16, 64),
    "F32": (_floats, 32, 128),
}
_SOURCE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@lru_cache(maxsize=32)
def exact_encoder(name: str, source: str = "F32") -> Encode:
    """`encode(x, out, n_blocks)` from a plain type: whether all weights were finite. Other threads run meanwhile.

    F16 is read where the CPU knows it: elsewhere infinities would be large numbers.
    """
    emit, bits, block_bytes = _KINDS[name]
    weight_bytes = _SOURCE_BYTES[source]

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        x, out = e.ptr(e.field(op, 0)), e.ptr(e.field(op, 1))
        nothing = ir.Constant(_FLOATS, [0.0] * _BLOCK)
        spoiled = e.var(nothing)  # 0 times a weight is NaN if that is not finite
        with e.loop(last, first) as i:
            weights = _load(e, source, e.at(x, e.mul(i, weight_bytes * _BLOCK)))
            block = _Block(e, weights, e.at(out, e.mul(i, block_bytes)))
            e.set(spoiled, e.b.fadd(e.get(spoiled), e.b.fmul(block.x, nothing)))
            emit(block, bits)
        e.store(e.reduce_add(e.get(spoiled)), scratch, 4)

    address = compiler_for(current_isa()).kernel(f"encode_{source}_{name}_{_source_hash()}", body)
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * N_ARGS)(address)

    def encode(x: int, out: int, n_blocks: int) -> bool:
        op, spoiled = (ctypes.c_int64 * 2)(x, out), ctypes.c_float()
        run(ctypes.addressof(op), 0, 0, n_blocks, ctypes.addressof(spoiled))
        return spoiled.value == 0

    return encode


@lru_cache(maxsize=1)
def _source_hash() -> str:
    """The compiler's cache knows the sources of its own folder only."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
