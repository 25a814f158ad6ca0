"""PTX text to functions of statements. Only the form is read here; what an instruction means is in `instructions.py`.

Grammar: PTX ISA 8.8, "Syntax" and "State Spaces, Types, and Variables". What is not known is a `PTXError` with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
          "f16x2": 4, "bf16": 2, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
_LINE_DIRECTIVES = (
    ".loc",
    ".file",
    ".version",
    ".target",
    ".address_size",
    ".maxntid",
    ".minnctapersm",
    ".reqntid",
    ".pragma",
)
_VARIABLE = re.compile(
    r"(?:\.(?P<link>extern|visible|weak)\s+)?\.(?P<space>global|const|shared|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.(?P<ptr>ptr)[\s\w.]*?\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*(?:\.align\s+\d+\s+)?)?(?P<name>[\w$]+)\s*"
    r"(?P<array>\[\s*\d*\s*\])?\s*(?:=\s*(?P<value>.*))?",
    re.DOTALL,
)
_REGISTERS = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>.*)", re.DOTALL)
_HEADER = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)?\.(?P<kind>entry|func)\s*(?:\((?P<result>[^)]*)\))?\s*(?P<name>[\w$]+)\s*\((?P<params>[^)]*)\)",
    re.DOTALL,
)
_INSTRUCTION = re.compile(
    r"(?:@(?P<negated>!?)(?P<guard>[%\w$]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL
)


class PTXError(AssertionError):
    """PTX that this emulator does not know."""


@dataclass(frozen=True)
class Variable:
    space: str
    name: str
    n_bytes: int  # 0: an array without a size, the dynamic shared memory
    align: int
    value: bytes | None = None
    kind: str = "b8"  # type of the elements


@dataclass(frozen=True)
class Registers:
    kind: str
    names: tuple[str, ...]  # without %; a range `%r<9>` is "r<9>"


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Brace:
    opens: bool


@dataclass(frozen=True)
class Instruction:
    line: int
    opcode: str
    operands: tuple[str, ...]
    guard: str = ""  # a predicate register
    negated: bool = False


Statement = Variable | Registers | Label | Brace | Instruction


@dataclass
class Function:
    name: str
    is_entry: bool
    params: list[Variable]
    results: list[Variable]
    body: list[Statement] = field(default_factory=list)
    max_threads: int = 1024


@dataclass
class Module:
    target: int
    variables: dict[str, Variable]
    functions: dict[str, Function]
    places: dict[int, tuple[str, int]]  # PTX line -> file and line of the source


def parse(text: str) -> Module:
    """The whole module; PTXError names the line that is not understood."""
    lines = text.split("\n")
    module = Module(0, {}, {}, _places(lines))
    function: Function | None = None
    depth = max_threads = 0
    for line, statement in _statements(lines):
        if isinstance(statement, tuple):
            if statement[0] == "target":
                module.target = int(re.sub(r"\D", "", statement[1].split(",")[0]))
            elif function is not None:
                max_threads = 1
                for size in statement[1].split(","):
                    max_threads *= int(size)
                function.max_threads = max_threads
        elif statement == "{":
            depth += 1
            if depth > 1 and function is not None:
                function.body.append(Brace(True))
        elif statement == "}":
            depth -= 1
            if depth and function is not None:
                function.body.append(Brace(False))
        elif depth == 0:
            header = _HEADER.fullmatch(statement)
            if header is not None:
                function = _function(header, line)
                module.functions[function.name] = function
            else:
                variable = _variable(statement, line)
                module.variables[variable.name] = variable
        elif function is not None:
            function.body.append(_statement(statement, line))
    return module


def _places(lines: list[str]) -> dict[int, tuple[str, int]]:
    files: dict[int, str] = {}
    for text in lines:
        match = re.match(r'\s*\.file\s+(\d+)\s+"([^"]*)"', text)
        if match:
            files[int(match[1])] = match[2].rsplit("/", 1)[-1]
    places, current = {}, None
    for number, text in enumerate(lines, 1):
        match = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", text)
        if match:
            current = (files.get(int(match[1]), "?"), int(match[2]))
        elif current is not None:
            places[number] = current
    return places


def _statements(lines: list[str]) -> Iterator[tuple[int, str | tuple[str, str]]]:
    """Statements with the line they begin at: texts without `;`, single braces, and pairs for what a line by itself says."""
    pending, start, skipped = "", 0, 0
    for number, whole in enumerate(lines, 1):
        text = whole.split("//", 1)[0]
        stripped = text.strip()
        if skipped or stripped.startswith(".section"):  # debugging tables
            skipped += text.count("{") - text.count("}") + (stripped.startswith(".section") and "{" not in text)
            skipped -= stripped == "{" and lines[number - 2].strip().startswith(".section")
            continue
        word = stripped.split(None, 1)[0] if stripped else ""
        if word in _LINE_DIRECTIVES:
            if word == ".target":
                yield number, ("target", stripped.split(None, 1)[1])
            elif word in (".maxntid", ".reqntid"):
                yield from _header_of(pending, start)
                pending = ""
                yield number, ("threads", stripped.split(None, 1)[1])
            continue
        position = 0
        while position < len(text):
            char = text[position]
            following = text[position + 1 : position + 2]
            if not pending.strip():
                pending, start = "", number
            if char == ";":
                yield start, pending.strip()
                pending = ""
            elif char in "{}" and (not pending.strip() or _HEADER.fullmatch(pending.strip())):
                yield from _header_of(pending, start)
                yield number, char
                pending = ""
            elif char == ":" and following != ":" and re.fullmatch(r"\s*[\w$]+", pending):
                yield start, pending.strip() + ":"
                pending = ""
            else:
                pending += char + (following if char == ":" else "")
                position += char == ":"
            position += 1
        pending += " "
    if pending.strip():
        raise PTXError(f"PTX line {start}: {pending.strip()!r} has no end")


def _header_of(pending: str, start: int) -> Iterator[tuple[int, str]]:
    if pending.strip():
        yield start, pending.strip()


def _function(header: re.Match[str], line: int) -> Function:
    params = [_variable(text.strip(), line) for text in header["params"].split(",") if text.strip()]
    results = [_variable(text.strip(), line) for text in (header["result"] or "").split(",") if text.strip()]
    return Function(header["name"], header["kind"] == "entry", params, results)


def _variable(text: str, line: int) -> Variable:
    match = _VARIABLE.fullmatch(text)
    if match is None or match["type"] not in WIDTHS:
        raise PTXError(f"PTX line {line}: cannot read {text!r}")
    width = WIDTHS[match["type"]]
    count = int(match["array"].strip("[] ") or 0) if match["array"] else 1
    value = _initial(match["value"], match["type"], count, line) if match["value"] else None
    return Variable(match["space"], match["name"], width * count, int(match["align"] or width), value, match["type"])


def _initial(text: str, kind: str, count: int, line: int) -> bytes:
    width, data = WIDTHS[kind], b""
    for item in text.strip().strip("{}").split(","):
        word = item.strip()
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", word):
            number = int(word[2:], 16)
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", word):
            number = int(word, 0)
        else:
            raise PTXError(f"PTX line {line}: cannot read the value {word!r}")
        data += (number & (1 << 8 * width) - 1).to_bytes(width, "little")
    return data + bytes(width * count - len(data))


def _statement(text: str, line: int) -> Statement:
    if text.endswith(":"):
        return Label(text[:-1])
    registers = _REGISTERS.fullmatch(text)
    if registers is not None:
        return Registers(registers["type"], tuple(name.strip().lstrip("%") for name in registers["names"].split(",")))
    if text.startswith("."):
        return _variable(text, line)
    match = _INSTRUCTION.fullmatch(text)
    if match is None:
        raise PTXError(f"PTX line {line}: cannot read {text!r}")
    operands = tuple(_split(match["operands"]))
    return Instruction(line, match["opcode"], operands, match["guard"] or "", bool(match["negated"]))


def _split(text: str) -> Iterator[str]:
    """Operands; commas within braces, brackets and parentheses separate nothing."""
    depth, word = 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            yield word.strip()
            word = ""
        else:
            word += char
    if word.strip():
        yield word.strip()
