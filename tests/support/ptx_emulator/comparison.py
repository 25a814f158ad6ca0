"""`setp` and `cvt`: PTX ISA 8.8, "Comparison and Selection Instructions", "cvt"."""

from __future__ import annotations

from ptx_emulator.operands import C_TYPES, Operation, rule

_SIGNS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
_FLOATS = ("f32", "f64")
_ROUND = {"rn": "FE_TONEAREST", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
_WHOLE = {"rni": "kNearest", "rzi": "kZero", "rmi": "kDown", "rpi": "kUp"}


@rule("setp")
def _set_predicate(op: Operation) -> str:
    kind = op.kind()
    compare = op.take(*_SIGNS, *_UNORDERED, "num", "nan")
    join, ftz = op.take("and", "or", "xor"), op.flag("ftz")
    op.finish(4 if join else 3)
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        raise op.error("an unknown type")
    a, b = (f"flushed({op.get(i, kind)})" if ftz else op.get(i, kind) for i in (1, 2))
    if compare in ("num", "nan"):
        test = "x == x && y == y" if compare == "num" else "x != x || y != y"
    elif compare in _UNORDERED:
        test = f"x {_UNORDERED[compare]} y || x != x || y != y"
    elif compare == "ne" and kind in _FLOATS:
        test = "x != y && x == x && y == y"
    elif compare in _SIGNS:
        test = f"x {_SIGNS[compare]} y"
    else:
        raise op.error("an unknown comparison")
    sign = {"and": "&", "or": "|", "xor": "^", None: ""}[join]
    tail = f" {sign} {op.get(3, 'pred')}" if join else ""
    targets = op.operands[0].split("|")
    text = op.assign(targets[0], f"bool(is{tail})")
    if len(targets) == 2:
        text += op.assign(targets[1], f"bool(!is{tail})")
    return f"{{ const auto x = {a}; const auto y = {b}; const bool is = {test}; {text} }}"


@rule("cvt")
def _convert(op: Operation) -> str:
    source = op.kind()
    if source == "f32" and (pair := op.take("f16x2", "bf16x2")):
        return _pack(op, pair)
    target = op.kind()
    whole, mode = op.take(*_WHOLE), op.take(*_ROUND)
    ftz, sat = op.flag("ftz"), op.flag("sat")
    op.finish(2)
    x = op.get(1, source)
    if ftz and source == "f32":
        x = f"flushed({x})"
    if source == "f16":
        x, source = f"half_value({x})", "f32"
    elif source == "bf16":
        x, source = f"bfloat_value({x})", "f32"
    result = _between(op, source, target, x, whole, mode, sat)
    if ftz and target == "f32":
        result = f"flushed({result})"
    return op.put(0, result)


def _between(op: Operation, source: str, target: str, x: str, whole: str | None, mode: str | None, sat: bool) -> str:
    to = C_TYPES[target]
    if target in ("f16", "bf16"):
        if sat or whole or (mode, target) not in (("rn", "f16"), ("rn", "bf16"), ("rz", "f16")):
            raise op.error("an unknown rounding")
        wider = x if source == "f32" else f"(long double)({x})"
        name = "half_to_zero" if mode == "rz" else "half_of" if target == "f16" else "bfloat_of"
        return f"{name}({wider})"
    if target in _FLOATS:
        if source in _FLOATS:
            return _float_to_float(op, source, target, x, whole, mode, sat)
        if mode is None or whole:
            raise op.error("no rounding")
        result = f"{to}({x})" if mode == "rn" else f"converted_in<{to}>({_ROUND[mode]}, {x})"
        return f"saturated({result})" if sat else result
    if source in _FLOATS:
        if whole is None or mode:
            raise op.error("no rounding to an integer")
        return f"to_integer<{to}>({x}, {_WHOLE[whole]})"  # clamped in any case
    if whole or mode:
        raise op.error("an unknown rounding")
    return f"clamped<{to}>({x})" if sat else f"({to})({x})"


def _float_to_float(
    op: Operation, source: str, target: str, x: str, whole: str | None, mode: str | None, sat: bool
) -> str:
    if source == target:
        if mode:
            raise op.error("an unknown rounding")
        result = f"canonical(rounded({x}, {_WHOLE[whole]}))" if whole else f"canonical({x})"
    elif whole or (target == "f32") != (mode is not None):
        raise op.error("an unknown rounding")
    elif target == "f32" and mode != "rn" and mode is not None:
        result = f"converted_in<float>({_ROUND[mode]}, {x})"
    else:
        result = f"canonical({C_TYPES[target]}({x}))"
    return f"saturated({result})" if sat else result


def _pack(op: Operation, pair: str) -> str:
    """Two float32 to two 16-bit floats, the first operand in the upper half."""
    if op.take("rn") is None:
        raise op.error("an unknown rounding")
    op.finish(3)
    name = "half_of" if pair == "f16x2" else "bfloat_of"
    return op.put(0, f"uint32_t({name}({op.get(2, 'f32')}) | uint32_t({name}({op.get(1, 'f32')})) << 16)")
