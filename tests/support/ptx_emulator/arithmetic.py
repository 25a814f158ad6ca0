"""Instructions that compute: PTX ISA 8.8, "Integer Arithmetic", "Floating Point", "Half Precision", "Comparison and Selection",
"Logic and Shift" and "Data Movement and Conversion" as far as no memory is touched."""

from __future__ import annotations

from ptx_emulator.operands import C_TYPES, Operation, rule

_FLOATS = ("f32", "f64")
_HALVES = {"f16": "Half", "f16x2": "Half", "bf16": "Bfloat", "bf16x2": "Bfloat"}
_ROUND = {"rn": "FE_TONEAREST", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
_WHOLE = {"rni": "kNearest", "rzi": "kZero", "rmi": "kDown", "rpi": "kUp"}
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_FLOAT_NAMES = {"add": "add", "sub": "sub", "mul": "product", "fma": "fused", "div": "divided", "min": "least", "max": "most",
                "neg": "negated", "abs": "absolute", "sqrt": "root"}  # fmt: skip


def _half(op: Operation, kind: str, n: int) -> str:
    """An operation on one or two 16-bit floats."""
    op.take("rn")
    op.finish(n + 1)
    name = f"h_{op.base}<{_HALVES[kind]}>"
    operands = [op.get(i, kind) for i in range(1, n + 1)]
    if kind.endswith("x2"):
        taken = ", ".join(f"uint16_t a{i}" for i in range(n))
        given = ", ".join(f"a{i}" for i in range(n))
        return op.put(0, f"both([]({taken}) {{ return {name}({given}); }}, {', '.join(operands)})")
    return op.put(0, f"{name}({', '.join(operands)})")


def _float(op: Operation, kind: str, n: int) -> str:
    mode = op.take("rn", "rz", "rm", "rp")
    ftz, sat = op.flag("ftz"), op.flag("sat")
    if op.base in ("div", "sqrt"):
        mode = mode or (op.take("approx", "full") and "rn")
    op.finish(n + 1)
    operands = [op.get(i, kind) for i in range(1, n + 1)]
    if ftz:
        operands = [f"flushed({operand})" for operand in operands]
    if mode in (None, "rn"):
        result = f"{_FLOAT_NAMES[op.base]}({', '.join(operands)})"
    elif op.base == "fma":
        result = f"fused_in({_ROUND[mode]}, {', '.join(operands)})"
    else:
        raise op.error(f"an unknown rounding .{mode}")
    result = f"flushed({result})" if ftz else result
    return op.put(0, f"saturated({result})" if sat else result)


@rule("add", "sub", "min", "max")
def _sum(op: Operation) -> str:
    kind = op.kind()
    if kind in _HALVES:
        return _half(op, kind, 2)
    if kind in _FLOATS:
        return _float(op, kind, 2)
    op.finish(3)
    name = {"min": "lesser", "max": "larger"}.get(op.base, op.base)
    return op.put(0, f"{name}({op.get(1, kind)}, {op.get(2, kind)})")


@rule("mul", "mad", "fma")
def _product(op: Operation) -> str:
    kind, n = op.kind(), 2 if op.base == "mul" else 3
    if kind in _HALVES:
        return _half(op, kind, n)
    if kind in _FLOATS:
        return _float(op, kind, n)
    how = op.take("lo", "hi", "wide")
    op.finish(n + 1)
    if how is None or op.base == "fma":
        raise op.error("an unknown product")
    result = f"mul_{how}({op.get(1, kind)}, {op.get(2, kind)})"
    if n == 3:
        result = f"add({result}, {op.get(3, _WIDER[kind] if how == 'wide' else kind)})"
    return op.put(0, result)


@rule("div", "rem")
def _quotient(op: Operation) -> str:
    kind = op.kind()
    if op.base == "div" and kind in _FLOATS:
        return _float(op, kind, 2)
    op.finish(3)
    name = "quotient" if op.base == "div" else "remainder_of"
    return f"site = {op.line}; " + op.put(0, f"{name}({op.get(1, kind)}, {op.get(2, kind)})")


@rule("abs", "neg", "sqrt")
def _one_operand(op: Operation) -> str:
    kind = op.kind()
    if kind in _HALVES:
        return _half(op, kind, 1)
    if kind in _FLOATS:
        return _float(op, kind, 1)
    op.finish(2)
    value = op.get(1, kind)
    return op.put(0, f"absolute({value})" if op.base == "abs" else f"sub(({C_TYPES[kind]})0, {value})")


@rule("rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _function(op: Operation) -> str:
    kind = op.kind("f32", "f64")
    approx = op.take("approx", "rn")
    ftz = op.flag("ftz")
    op.finish(2)
    if approx is None or (kind == "f64" and op.base != "rcp"):
        raise op.error("an unknown function")
    x = op.get(1, kind)
    if kind == "f64":
        return op.put(0, f"rcp_gross({x})" if approx == "approx" else f"(1.0 / {x})")
    x = f"flushed({x})" if ftz else x
    result = {
        "rcp": "1.0 / double({})", "rsqrt": "1.0 / sqrt(double({}))", "ex2": "exp2(double({}))", "lg2": "log2(double({}))",
        "sin": "sin(double({}))", "cos": "cos(double({}))", "tanh": "tanh(double({}))",
    }[op.base].format(x)  # fmt: skip
    result = f"canonical(float({result}))"
    return op.put(0, f"flushed({result})" if ftz else result)


@rule("and", "or", "xor")
def _logic(op: Operation) -> str:
    kind = op.kind("pred", "b16", "b32", "b64")
    op.finish(3)
    sign = {"and": "&", "or": "|", "xor": "^"}[op.base]
    return op.put(0, f"({C_TYPES[kind]})({op.get(1, kind)} {sign} {op.get(2, kind)})")


@rule("not", "cnot")
def _not(op: Operation) -> str:
    kind = op.kind("pred", "b16", "b32", "b64")
    op.finish(2)
    sign = "!" if op.base == "cnot" or kind == "pred" else "~"
    return op.put(0, f"({C_TYPES[kind]})({sign}{op.get(1, kind)})")


@rule("shl", "shr")
def _shift(op: Operation) -> str:
    kind = op.kind()
    op.finish(3)
    return op.put(0, f"{op.base}({op.get(1, kind)}, {op.get(2, 'u32')})")


@rule("shf")
def _funnel(op: Operation) -> str:
    op.kind("b32")
    side, how = op.take("l", "r"), op.take("wrap", "clamp")
    op.finish(4)
    n = op.get(3, "u32")
    n = f"({n} & 31)" if how == "wrap" else f"lesser({n}, 32u)"
    return op.put(0, f"shf_{side}({op.get(1, 'b32')}, {op.get(2, 'b32')}, {n})")


@rule("lop3", "prmt")
def _bytes(op: Operation) -> str:
    op.kind("b32")
    op.finish(5 if op.base == "lop3" else 4)
    return op.put(0, f"{op.base}({', '.join(op.get(i, 'b32') for i in range(1, len(op.operands)))})")


@rule("bfe", "bfi")
def _field(op: Operation) -> str:
    kind = op.kind()
    n = 1 if op.base == "bfe" else 2
    op.finish(n + 3)
    values = [op.get(i, kind) for i in range(1, n + 1)] + [op.get(n + 1, "u32"), op.get(n + 2, "u32")]
    return op.put(0, f"{op.base}({', '.join(values)})")


@rule("popc", "clz", "brev", "bfind")
def _bits(op: Operation) -> str:
    kind = op.kind()
    shift = op.flag("shiftamt") if op.base == "bfind" else False
    op.finish(2)
    x = op.get(1, kind)
    calls = {"popc": f"uint32_t(__builtin_popcountll({x}))", "clz": f"clz({x})", "brev": f"reversed({x})"}
    return op.put(0, calls.get(op.base) or f"bfind({x}, {str(shift).lower()})")


@rule("dp4a")
def _dot(op: Operation) -> str:
    second, first = op.kind("s32", "u32"), op.kind("s32", "u32")
    op.finish(4)
    elements = {"s32": "int8_t", "u32": "uint8_t"}
    operands = ", ".join(op.get(i, "b32") for i in (1, 2, 3))
    return op.put(0, f"dp4a<{elements[first]}, {elements[second]}>({operands})")


@rule("selp", "slct")
def _select(op: Operation) -> str:
    if op.base == "slct":
        raise op.error("an unknown instruction")
    kind = op.kind()
    op.finish(4)
    return op.put(0, f"({op.get(3, 'pred')} ? {op.get(1, kind)} : {op.get(2, kind)})")


@rule("copysign")
def _copysign(op: Operation) -> str:
    kind = op.kind("f32", "f64")
    op.finish(3)
    return op.put(0, f"copysign_of({op.get(1, kind)}, {op.get(2, kind)})")


@rule("mov")
def _move(op: Operation) -> str:
    kind = op.kind()
    op.finish(2)
    wide, parts, taken = C_TYPES[kind], op.vector(1), op.vector(0)
    if parts is not None:  # several registers into one, the first in the lowest bits
        n_bits = 8 * int(kind[1:]) // 8 // len(parts)
        pieces = [f"({wide})({op.value(part, f'b{n_bits}')}) << {n_bits * i}" for i, part in enumerate(parts)]
        return op.put(0, f"({wide})({' | '.join(pieces)})")
    if taken is not None:
        n_bits = int(kind[1:]) // len(taken)
        pieces = [op.assign(part, f"uint{n_bits}_t(whole >> {n_bits * i})") for i, part in enumerate(taken)]
        return f"{{ const {wide} whole = {op.get(1, kind)}; {' '.join(pieces)} }}"
    return op.put(0, op.get(1, kind))
