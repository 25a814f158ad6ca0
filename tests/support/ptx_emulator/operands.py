"""What an instruction's operands are in C++: registers, numbers, addresses; and its modifiers, of which none may be left over."""

from __future__ import annotations

import re
from collections.abc import Callable

from ptx_emulator.parse import Instruction, PTXError, Registers, Variable

C_TYPES = {
    "pred": "bool", "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t", "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t",
    "f16": "uint16_t", "bf16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t", "f32": "float",
    "f16x2": "uint32_t", "bf16x2": "uint32_t", "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t", "f64": "double",
}  # fmt: skip
_REGISTER_TYPES = C_TYPES | {"s8": "uint8_t", "s16": "uint16_t", "s32": "uint32_t", "s64": "uint64_t"}
_INDICES = {
    "tid": "emulator_thread",
    "ctaid": "emulator_block",
    "ntid": "emulator_block_size",
    "nctaid": "emulator_grid_size",
}
_SPECIAL = {f"{name}.{axis}": f"{value}.{axis}" for name, value in _INDICES.items() for axis in "xyz"} | {
    "laneid": "c.lane",
    "warpid": "uint32_t(c.thread / 32)",
    "lanemask_eq": "(1u << c.lane)",
    "lanemask_lt": "((1u << c.lane) - 1)",
    "lanemask_le": "((2u << c.lane) - 1)",
    "lanemask_ge": "~((1u << c.lane) - 1)",
    "lanemask_gt": "~((2u << c.lane) - 1)",
}
_SINK = "_"


class Names:
    """The registers and variables that are in scope, with their names in C++, and all that must be declared."""

    def __init__(self, module_variables: dict[str, str]) -> None:
        self._scopes: list[dict[str, str]] = [dict(module_variables)]
        self._ranges: list[dict[str, tuple[str, int]]] = [{}]
        self._n_blocks = 0
        self.registers: dict[str, str] = {}  # C++ name -> type

    def open(self) -> None:
        self._n_blocks += 1
        self._scopes.append({})
        self._ranges.append({})

    def close(self) -> None:
        self._scopes.pop()
        self._ranges.pop()

    def declare(self, registers: Registers) -> None:
        kind = _REGISTER_TYPES[registers.kind]
        for name in registers.names:
            match = re.fullmatch(r"([\w$]+)<(\d+)>", name)
            if match:
                self._ranges[-1][match[1]] = (kind, int(match[2]))
            else:
                place = f"{name.replace('$', '_')}_{self._n_blocks}"
                self._scopes[-1][name] = place
                self.registers[place] = kind

    def bind(self, name: str, place: str) -> None:
        self._scopes[-1][name] = place

    def unique(self, name: str) -> str:
        return f"{re.sub(r'[^A-Za-z0-9]', '_', name)}_{self._n_blocks}"

    def find(self, name: str) -> str | None:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        match = re.fullmatch(r"([A-Za-z_$]+)(\d+)", name)
        if match:
            for ranges in reversed(self._ranges):
                if match[1] in ranges and int(match[2]) < ranges[match[1]][1]:
                    self.registers[name] = ranges[match[1]][0]
                    return name
        return None


class Operation:
    """One instruction while it is translated. Methods give C++ expressions; what is unknown raises a PTXError."""

    def __init__(self, instruction: Instruction, names: Names) -> None:
        self.instruction = instruction
        self.line = instruction.line
        self.base, *self._modifiers = instruction.opcode.split(".")
        self.operands = instruction.operands
        self._names = names

    def error(self, what: str) -> PTXError:
        text = f"{self.instruction.opcode} {', '.join(self.operands)}"
        return PTXError(f"PTX line {self.line}: {what} in `{text}`")

    # ---- modifiers
    def take(self, *names: str) -> str | None:
        """The first of these modifiers that is there."""
        for name in self._modifiers:
            if name in names:
                self._modifiers.remove(name)
                return name
        return None

    def flag(self, name: str) -> bool:
        return self.take(name) is not None

    def kind(self, *allowed: str) -> str:
        """The last modifier, a type."""
        if not self._modifiers or self._modifiers[-1] not in (allowed or C_TYPES):
            raise self.error("an unknown type")
        return self._modifiers.pop()

    def finish(self, n_operands: int | None = None) -> None:
        if self._modifiers:
            raise self.error(f"an unknown modifier .{self._modifiers[0]}")
        if n_operands is not None and len(self.operands) != n_operands:
            raise self.error(f"{len(self.operands)} operands, not {n_operands},")

    # ---- operands
    def get(self, index: int, kind: str) -> str:
        return self.value(self.operands[index], kind)

    def value(self, text: str, kind: str) -> str:
        target = C_TYPES[kind]
        if text.startswith("!"):
            return f"(!{self.value(text[1:], 'pred')})"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return f"as<{target}>(to_float(0x{text[2:]}u))"
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return f"as<{target}>(to_double(0x{text[2:]}ull))"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            if kind in ("f32", "f64"):
                raise self.error(f"an integer {text} where a float is wanted")
            return f"({target})({int(text.rstrip('U'), 0) & (1 << 64) - 1}ull)"
        name = text.lstrip("%")
        if text.startswith("%") and name in _SPECIAL:
            return f"as<{target}>({_SPECIAL[name]})"
        found = self._names.find(name)
        if found is None:
            raise self.error(f"an unknown operand {text!r}")
        return f"as<{target}>({found})"

    def address(self, text: str) -> str:
        """What stands in brackets, as a uint64_t."""
        match = re.fullmatch(r"\[\s*(%?[\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise self.error(f"an unknown address {text!r}")
        offset = int(match[2], 0) if match[2] else 0
        if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", match[1]):
            return f"{int(match[1], 0) + offset}ull"
        found = self._names.find(match[1].lstrip("%"))
        if found is None:
            raise self.error(f"an unknown address {text!r}")
        if self._names.registers.get(found) == "uint32_t":
            return f"uint64_t(uint32_t({found} + {offset & 0xFFFFFFFF}u))"
        return f"({found} + {offset & (1 << 64) - 1}ull)"

    def place(self, text: str) -> str | None:
        """The register to write; None for `_`."""
        if text == _SINK:
            return None
        found = self._names.find(text.lstrip("%"))
        if found is None or found not in self._names.registers:
            raise self.error(f"no register {text!r} to write")
        return found

    def put(self, index: int, expression: str) -> str:
        return self.assign(self.operands[index], expression)

    def assign(self, text: str, expression: str) -> str:
        place = self.place(text)
        return f"(void)({expression});" if place is None else f"put({place}, {expression});"

    def vector(self, index: int) -> list[str] | None:
        """The parts of `{a, b}`; None of anything else."""
        text = self.operands[index]
        return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else None


Rule = Callable[[Operation], str]
RULES: dict[str, Rule] = {}


def rule(*bases: str) -> Callable[[Rule], Rule]:
    """Registers what translates the instructions of these names."""

    def register(function: Rule) -> Rule:
        for base in bases:
            RULES[base] = function
        return function

    return register


def variable_address(variable: Variable, offset: int | None, place: str) -> str:
    """Where a variable is, as a uint64_t."""
    if variable.space == "shared":
        return "uint64_t(kSharedBase + kStaticBytes)" if offset is None else f"uint64_t(kSharedBase + {offset})"
    return f"uint64_t({place})"
