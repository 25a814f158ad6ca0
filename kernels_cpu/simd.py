"""A small language for SIMD kernels: Python that runs once, at emission, and leaves LLVM vector IR behind.

Vectors have `isa.lanes` 32-bit lanes; addresses are byte pointers (`ptr`) with byte offsets (`at`). Unrolling is a Python
loop, a register is a Python variable, a run-time loop is `with e.loop(n) as i`. Nothing here is fast-math: the order of
every float operation is the one written down, which is what makes a row's result independent of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from pyinfer.kernels_cpu.isa import ISA

i1, i8, i16, i32, i64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
f16, f32 = ir.HalfType(), ir.FloatType()


class _BFloatType(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


bf16 = _BFloatType()
void = ir.VoidType()
Reg = Any  # an llvmlite value; llvmlite has no types to offer


def vector(element: Reg, n: int) -> Reg:
    return ir.VectorType(element, n)


class Emitter:
    """An IR builder for one function, with vector helpers for one ISA."""

    def __init__(self, builder: ir.IRBuilder, isa: ISA) -> None:
        self.b, self.isa, self.L = builder, isa, isa.lanes
        self.vi, self.vf = vector(i32, self.L), vector(f32, self.L)

    # ---- constants
    def c(self, value: int) -> Reg:
        return ir.Constant(i64, value)

    def ints(self, value: int) -> Reg:
        signed = value - (1 << 32) if value >= 1 << 31 else value
        return ir.Constant(self.vi, [signed] * self.L)

    def floats(self, value: float) -> Reg:
        return ir.Constant(self.vf, [value] * self.L)

    def const(self, element: Reg, values: Sequence[float]) -> Reg:
        return ir.Constant(vector(element, len(values)), list(values))

    # ---- 64-bit integers
    def add(self, a: Reg, b: Reg | int) -> Reg:
        return a if isinstance(b, int) and b == 0 else self.b.add(a, self.c(b) if isinstance(b, int) else b)

    def sub(self, a: Reg, b: Reg | int) -> Reg:
        return self.b.sub(a, self.c(b) if isinstance(b, int) else b)

    def mul(self, a: Reg, b: Reg | int) -> Reg:
        return self.b.mul(a, self.c(b) if isinstance(b, int) else b)

    def lt(self, a: Reg, b: Reg | int) -> Reg:
        return self.b.icmp_signed("<", a, self.c(b) if isinstance(b, int) else b)

    def min(self, a: Reg, b: Reg | int) -> Reg:
        b = self.c(b) if isinstance(b, int) else b
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def max(self, a: Reg, b: Reg | int) -> Reg:
        b = self.c(b) if isinstance(b, int) else b
        return self.b.select(self.b.icmp_signed(">", a, b), a, b)

    # ---- memory
    def ptr(self, address: Reg) -> Reg:
        return self.b.inttoptr(address, ir.PointerType(i8))

    def at(self, pointer: Reg, offset: Reg | int) -> Reg:
        return self.b.gep(pointer, [self.c(offset) if isinstance(offset, int) else offset])

    def load(self, pointer: Reg, kind: Reg, align: int = 1) -> Reg:
        value = self.b.load(self.b.bitcast(pointer, ir.PointerType(kind)), typ=kind)
        value.align = align
        return value

    def store(self, value: Reg, pointer: Reg, align: int = 1) -> None:
        self.b.store(value, self.b.bitcast(pointer, ir.PointerType(value.type))).align = align

    def field(self, record: Reg, index: int) -> Reg:
        """The int64 at `index` of a record of int64 words."""
        return self.load(self.at(record, 8 * index), i64, 8)

    def prefetch(self, pointer: Reg, level: int = 1) -> None:
        """Ask for a cache line into L1 or L2; an address outside any mapping does nothing."""
        self.call("llvm.prefetch.p0", void, [pointer, i32(0), i32(4 - level), i32(1)])

    # ---- vectors
    def splat(self, scalar: Reg, lanes: int | None = None) -> Reg:
        """All lanes equal; a splat of a 4-byte load becomes a broadcast memory operand where the ISA has one."""
        n = lanes or self.L
        kind = vector(scalar.type, n)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(i32, 0))
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(vector(i32, n), [0] * n))

    def splat_int(self, pointer: Reg) -> Reg:
        return self.splat(self.load(pointer, i32, 4))

    def splat_float(self, pointer: Reg) -> Reg:
        return self.splat(self.load(pointer, f32, 4))

    def shuffle(self, a: Reg, indices: Sequence[int], b: Reg | None = None) -> Reg:
        other = ir.Constant(a.type, ir.Undefined) if b is None else b
        return self.b.shuffle_vector(a, other, ir.Constant(vector(i32, len(indices)), list(indices)))

    def lane_index(self) -> Reg:
        return ir.Constant(self.vi, list(range(self.L)))

    def call(self, name: str, result: Reg, args: Sequence[Reg], fastmath: Sequence[str] = ()) -> Reg:
        module = self.b.module
        fn = module.globals.get(name)
        if fn is None:
            fn = ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(fn, list(args), fastmath=tuple(fastmath))

    def _suffix(self, kind: Reg) -> str:
        scalar = kind.element if isinstance(kind, ir.VectorType) else kind
        name = {i8: "i8", i16: "i16", i32: "i32", i64: "i64"}.get(scalar) or ("f32" if scalar == f32 else "f16")
        return f"v{kind.count}{name}" if isinstance(kind, ir.VectorType) else name

    def fma(self, a: Reg, b: Reg, c: Reg) -> Reg:
        """a * b + c; rounded once where the CPU has FMA, twice on the portable path, always the same on one machine."""
        if self.isa.name == "portable":
            return self.b.fadd(self.b.fmul(a, b), c)
        return self.call(f"llvm.fma.{self._suffix(a.type)}", a.type, [a, b, c])

    def fabs(self, a: Reg) -> Reg:
        return self.call(f"llvm.fabs.{self._suffix(a.type)}", a.type, [a])

    def fmax(self, a: Reg, b: Reg) -> Reg:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def fmin(self, a: Reg, b: Reg) -> Reg:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def round_to_int(self, a: Reg) -> Reg:
        """Half to even, as int32; |a| must stay below 2^22: the addition of 1.5 * 2^23 does the rounding."""
        magic = ir.Constant(a.type, [12582912.0] * a.type.count)
        n = a.type.count
        shifted = self.b.bitcast(self.b.fadd(a, magic), vector(i32, n))
        return self.b.sub(shifted, ir.Constant(vector(i32, n), [0x4B400000] * n))

    def to_float(self, a: Reg) -> Reg:
        return self.b.sitofp(a, vector(f32, a.type.count))

    def reduce_add(self, a: Reg) -> Reg:
        """Sum of all lanes by halving: the same tree on every call."""
        return self._halve(a, self.b.fadd if a.type.element == f32 else self.b.add)

    def reduce_max(self, a: Reg) -> Reg:
        return self._halve(a, self.fmax)

    def reduce_min(self, a: Reg) -> Reg:
        """Of 32-bit integers."""
        return self._halve(a, lambda x, y: self.b.select(self.b.icmp_signed("<", x, y), x, y))

    def _halve(self, a: Reg, combine: Any) -> Reg:
        n = a.type.count
        while n > 1:
            n //= 2
            a = combine(self.shuffle(a, range(n)), self.shuffle(a, range(n, 2 * n)))
        return self.b.extract_element(a, ir.Constant(i32, 0))

    # ---- float16
    def half_to_float(self, h: Reg) -> Reg:
        """<n x half> (or its i16 bits) to <n x float>. The portable path keeps to integers: baseline x86 would call a library."""
        n = h.type.count
        if self.isa.half:
            return self.b.fpext(self.b.bitcast(h, vector(f16, n)), vector(f32, n))
        ints = vector(i32, n)
        w = self.b.zext(self.b.bitcast(h, vector(i16, n)), ints)
        k = lambda v: ir.Constant(ints, [v] * n)  # noqa: E731
        magnitude = self.b.shl(self.b.and_(w, k(0x7FFF)), k(13))
        scaled = self.b.fmul(self.b.bitcast(magnitude, vector(f32, n)), ir.Constant(vector(f32, n), [2.0**112] * n))
        sign = self.b.shl(self.b.and_(w, k(0x8000)), k(16))
        return self.b.bitcast(self.b.or_(self.b.bitcast(scaled, ints), sign), vector(f32, n))

    def float_to_half(self, x: Reg) -> Reg:
        """<n x float> to the i16 bits of float16, half to even; |x| must be at most 65504."""
        n = x.type.count
        if self.isa.half:
            return self.b.bitcast(self.b.fptrunc(x, vector(f16, n)), vector(i16, n))
        ints = vector(i32, n)
        k = lambda v: ir.Constant(ints, [v] * n)  # noqa: E731
        bits = self.b.bitcast(x, ints)
        sign = self.b.and_(self.b.lshr(bits, k(16)), k(0x8000))
        magnitude = self.b.and_(bits, k(0x7FFFFFFF))
        # normal results: rebias, round half to even in the integer; tiny ones: let a float addition align the bits
        odd = self.b.and_(self.b.lshr(magnitude, k(13)), k(1))
        normal = self.b.lshr(self.b.add(self.b.add(magnitude, k(0xC8000FFF - (1 << 32))), odd), k(13))
        half_float = ir.Constant(vector(f32, n), [0.5] * n)
        tiny = self.b.sub(
            self.b.bitcast(self.b.fadd(self.b.bitcast(magnitude, vector(f32, n)), half_float), ints), k(0x3F000000)
        )
        small = self.b.icmp_signed("<", magnitude, k(0x38800000))
        return self.b.trunc(self.b.or_(self.b.select(small, tiny, normal), sign), vector(i16, n))

    def float_to_bfloat(self, x: Reg) -> Reg:
        """<n x float> to the i16 bits of bfloat16, half to even."""
        ints = vector(i32, x.type.count)
        k = lambda v: ir.Constant(ints, [v] * x.type.count)  # noqa: E731
        bits = self.b.bitcast(x, ints)
        odd = self.b.and_(self.b.lshr(bits, k(16)), k(1))
        rounded = self.b.lshr(self.b.add(self.b.add(bits, k(0x7FFF)), odd), k(16))
        return self.b.trunc(rounded, vector(i16, x.type.count))

    def load_halves(self, pointer: Reg, n: int | None = None) -> Reg:
        """n float16 in memory to <n x float>."""
        return self.half_to_float(self.load(pointer, vector(i16, n or self.L), 2))

    # ---- the integer dot product: acc += sum of 4 (u8 * i8), operands as i32 lanes
    def dot4(self, acc: Reg, unsigned: Reg, signed: Reg, max_unsigned: int) -> Reg:
        n = 4 * self.L
        bytes_, words = vector(i8, n), vector(i16, n // 2)
        u, s = self.b.bitcast(unsigned, bytes_), self.b.bitcast(signed, bytes_)
        if self.isa.dot == "vpdpbusd":
            return self.call(f"llvm.x86.avx512.vpdpbusd.{32 * self.L}", self.vi, [acc, unsigned, signed])
        if self.isa.dot == "vpmaddubsw":
            if max_unsigned > 127:  # pairs would saturate: |w| (with w = u - 128) times the activation with w's sign
                w = self.b.xor(u, ir.Constant(bytes_, [-128] * n))
                s = self.call("llvm.x86.avx2.psign.b", bytes_, [s, w])
                u = self.call(f"llvm.abs.v{n}i8", bytes_, [w, ir.Constant(i1, 0)])
            pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", words, [u, s])
            quads = self.call("llvm.x86.avx2.pmadd.wd", self.vi, [pairs, ir.Constant(words, [1] * (n // 2))])
            return self.b.add(acc, quads)
        if self.isa.dot == "sdot":
            if max_unsigned > 127:  # both sides are signed here: w = u - 128, and no offset is left
                u = self.b.xor(u, ir.Constant(bytes_, [-128] * n))
            return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", self.vi, [acc, u, s])
        # even and odd bytes as i16, so that a baseline CPU multiplies eight at a time
        to16 = vector(i16, n // 2)
        even, odd = range(0, n, 2), range(1, n, 2)
        products = [
            self.b.mul(self.b.zext(self.shuffle(u, part), to16), self.b.sext(self.shuffle(s, part), to16))
            for part in (even, odd)
        ]
        wide = vector(i32, n // 2)
        total = self.b.add(self.b.sext(products[0], wide), self.b.sext(products[1], wide))
        pairs32 = self.b.add(self.shuffle(total, range(0, n // 2, 2)), self.shuffle(total, range(1, n // 2, 2)))
        return self.b.add(acc, pairs32)

    def dot_bfloat(self, acc: Reg, a: Reg, b: Reg) -> Reg:
        """acc += the products of two bfloat16 pairs in each lane, operands as i32 lanes; subnormal ones count as zero."""
        pairs = vector(bf16, 2 * self.L)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.L}"
        return self.call(name, self.vf, [acc, self.b.bitcast(a, pairs), self.b.bitcast(b, pairs)])

    def signed_offset(self, offset: int) -> int:
        """What is left to subtract from `dot4`'s codes: where it works on signed weights Q8_0's 128 is off already."""
        return 0 if self.isa.dot in ("vpmaddubsw", "sdot") and offset == 128 else offset

    # ---- exp
    def exp(self, x: Reg) -> Reg:
        """e^x for x <= 0, 0 below -87; Cephes' polynomial, relative error about 2e-7."""
        k = self.floats
        x = self.fmax(x, k(-87.0))
        n = self.round_to_int(self.b.fmul(x, k(1.44269504)))
        nf = self.to_float(n)
        r = self.fma(nf, k(-0.693359375), x)
        r = self.fma(nf, k(2.12194440e-4), r)
        p = k(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, k(coefficient))
        p = self.b.fadd(self.fma(self.b.fmul(p, r), r, r), k(1.0))
        scale = self.b.shl(self.b.add(n, self.ints(127)), self.ints(23))
        return self.b.fmul(p, self.b.bitcast(scale, self.vf))

    # ---- registers that change, loops, branches
    def var(self, initial: Reg) -> Reg:
        """A register that can be set again; inside a loop it starts anew with `initial` every time round."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(initial.type)
        self.b.store(initial, slot)
        return slot

    def get(self, slot: Reg) -> Reg:
        return self.b.load(slot)

    def set(self, slot: Reg, value: Reg) -> None:
        self.b.store(value, slot)

    @contextmanager
    def loop(self, stop: Reg | int, start: Reg | int = 0, step: Reg | int = 1) -> Iterator[Reg]:
        """for i in range(start, stop, step)"""
        b = self.b
        as_reg = lambda v: self.c(v) if isinstance(v, int) else v  # noqa: E731
        head, body, done = (b.function.append_basic_block(n) for n in ("head", "body", "done"))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(i64)
        index.add_incoming(as_reg(start), before)
        b.cbranch(b.icmp_signed("<", index, as_reg(stop)), body, done)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, as_reg(step)), b.block)
        b.branch(head)
        b.position_at_end(done)

    @contextmanager
    def repeat_while(self, condition: Callable[[], Reg]) -> Iterator[None]:
        """while condition(): for loops whose step is found inside; what changes is in `var`s."""
        b = self.b
        head, body, done = (b.function.append_basic_block(n) for n in ("head", "body", "done"))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(condition(), body, done)
        b.position_at_end(body)
        yield
        b.branch(head)
        b.position_at_end(done)

    @contextmanager
    def when(self, condition: Reg) -> Iterator[None]:
        with self.b.if_then(condition):
            yield
