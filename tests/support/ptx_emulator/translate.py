"""PTX to C++: one file for each kernel, with the functions that it calls. Registers are variables, labels are gotos."""

from __future__ import annotations

import re

from ptx_emulator import arithmetic, comparison, memory, warp
from ptx_emulator.operands import RULES, Names, Operation, variable_address
from ptx_emulator.parse import Brace, Function, Instruction, Label, Module, PTXError, Registers, Variable

assert arithmetic and comparison and memory and warp  # they register their rules
_RED_ZONE = 256  # between shared variables: what runs past one is found; a multiple of 128 leaves the banks as they are
_RESERVED = 1024  # of shared memory, by the system, from sm_80 on
_POISON = {"bool": "true", "float": "to_float(0xffffffffu)", "double": "to_double(0xffffffffffffffffull)"}


def translate(module: Module, entry: str) -> str:
    """The C++ of one kernel."""
    if entry not in module.functions or not module.functions[entry].is_entry:
        raise PTXError(f"there is no kernel {entry}; there are {', '.join(module.functions)}")
    functions = _reachable(module, entry)
    shared = _shared_layout(module, functions)
    parts = ['#include "ptx_warp.h"', f'static const char kKernelName[] = "{entry}";', shared.text]
    module_names = dict(shared.places)
    constants = [v for v in module.variables.values() if v.space in ("global", "const") and _uses(functions, v.name)]
    for variable in constants:
        place = f"module_{re.sub(r'[^A-Za-z0-9]', '_', variable.name)}"
        values = ", ".join(str(byte) for byte in variable.value or bytes(variable.n_bytes))
        parts.append(f"alignas(16) static unsigned char {place}[] = {{{values}}};")
        module_names[variable.name] = f"uint64_t({place})"
    listed = "".join(f"{{uint64_t({module_names[v.name][9:-1]}), {v.n_bytes}}}, " for v in constants)
    parts.append(f"static const struct {{ uint64_t at, n_bytes; }} module_ranges[] = {{{listed}{{0, 0}}}};")
    parts += [
        f"static void f_{_safe(f.name)}(Context&, unsigned char* const*, unsigned char* const*);" for f in functions
    ]
    parts += [_function(module, function, module_names, shared.of_function) for function in functions]
    parts.append(_entry(module.functions[entry], shared.n_bytes))
    return "\n".join(parts)


class _Shared:
    """Where the variables of shared memory lie."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}  # of the module's own
        self.of_function: dict[tuple[str, str], str] = {}
        self.n_bytes = 0  # as a GPU counts them
        self.text = ""


def _shared_layout(module: Module, functions: list[Function]) -> _Shared:
    found = _Shared()
    spread, extents = 0, []
    own = [(f.name, v) for f in functions for v in f.body if isinstance(v, Variable) and v.space == "shared"]
    for owner, variable in [("", v) for v in module.variables.values() if v.space == "shared"] + own:
        if not _uses(functions, variable.name):
            continue
        offset: int | None = None
        if variable.n_bytes:
            found.n_bytes = -(-found.n_bytes // variable.align) * variable.align
            offset = found.n_bytes + spread
            extents.append((offset, variable.n_bytes))
            found.n_bytes += variable.n_bytes
            spread += _RED_ZONE
        place = variable_address(variable, offset, "")
        if owner:
            found.of_function[owner, variable.name] = place
        else:
            found.places[variable.name] = place
    begin = -(-found.n_bytes // 16) * 16 + spread
    valid = "".join(f"memset(static_valid + {at}, 1, {n}); " for at, n in extents)
    base = _RESERVED if module.target >= 80 else 0
    found.text = (
        f"const uint32_t kSharedBase = {base}, kStaticBytes = {begin};\nconst int kArch = {module.target};\n"
        f"alignas(128) unsigned char static_shared[{begin or 1}], static_valid[{begin or 1}];\n"
        f"__attribute__((constructor)) static void mark_valid() {{ {valid}}}"
    )
    return found


def _entry(function: Function, n_static: int) -> str:
    codes = "".join("f" if p.kind == "f32" else "i" if p.n_bytes == 4 else "q" for p in function.params)
    return (
        f"static void ptx_entry(Context& c, void** args) {{ "
        f"f_{_safe(function.name)}(c, reinterpret_cast<unsigned char* const*>(args), nullptr); }}\n"
        f'extern "C" const char* emulator_signature() {{ return "{codes}"; }}\n'
        f'extern "C" int emulator_static_shared() {{ return {n_static}; }}\n'
        f'extern "C" int ptx_max_threads() {{ return {function.max_threads}; }}\n'
        '#include "ptx_entry.h"'
    )


def _function(
    module: Module, function: Function, module_names: dict[str, str], shared: dict[tuple[str, str], str]
) -> str:
    names = Names(module_names)
    for i, parameter in enumerate(function.params):
        names.bind(parameter.name, f"uint64_t(params[{i}])")
    for i, parameter in enumerate(function.results):
        names.bind(parameter.name, f"uint64_t(results[{i}])")
    arrays: list[str] = []
    lines: list[str] = []
    for statement in function.body:
        if isinstance(statement, Brace):
            if statement.opens:
                names.open()
            else:
                names.close()
        elif isinstance(statement, Registers):
            names.declare(statement)
        elif isinstance(statement, Label):
            lines.append(f"{warp.label(statement.name)}:;")
        elif isinstance(statement, Variable):
            if statement.space == "shared":
                names.bind(statement.name, shared.get((function.name, statement.name), "0"))
            else:
                arrays.append(_array(statement, names))
        else:
            lines.append(_instruction(module, function, statement, names))
    registers = [
        f"{kind} {name} = {_POISON.get(kind, f'({kind})0xdeadbeefdeadbeefull')};"
        for name, kind in names.registers.items()
    ]
    arguments = "Context& c, unsigned char* const* params, unsigned char* const* results"
    head = [f"static void f_{_safe(function.name)}({arguments}) {{", "const int depots_before = c.n_depots;"]
    return "\n".join([*head, *registers, *arrays, *lines, "end:", "c.n_depots = depots_before;", "}"])


def _array(variable: Variable, names: Names) -> str:
    place = names.unique(variable.name)
    names.bind(variable.name, f"uint64_t({place})")
    text = f"alignas(16) unsigned char {place}[{variable.n_bytes}]; memset({place}, kPoison, sizeof {place});"
    if variable.space == "local":
        text += (
            f" c.depots[c.n_depots++] = Range{{uint64_t({place}), uint64_t({place}) + {variable.n_bytes}, nullptr}};"
        )
    return text


def _instruction(module: Module, function: Function, instruction: Instruction, names: Names) -> str:
    operation = Operation(instruction, names)
    if operation.base == "call":
        text = _call(module, operation, names)
    elif operation.base not in RULES or (operation.base == "exit" and not function.is_entry):
        raise operation.error("an unknown instruction")
    else:
        try:
            text = RULES[operation.base](operation)
        except (KeyError, ValueError, IndexError) as error:
            raise operation.error("an unknown form") from error
    if instruction.guard:
        text = f"if ({'!' if instruction.negated else ''}{operation.value(instruction.guard, 'pred')}) {{ {text} }}"
    return text


def _call(module: Module, operation: Operation, names: Names) -> str:
    operation.flag("uni")
    operation.finish()
    operands = list(operation.operands)
    results = operands.pop(0).strip("() \n").split(",") if operands[0].startswith("(") else []
    target = operands.pop(0)
    given = [word for text in operands for word in text.strip("() \n").split(",")]
    if target not in module.functions:
        raise operation.error(f"no function {target!r}")

    def pointers(words: list[str]) -> str:
        places = [names.find(word.strip()) for word in words if word.strip()]
        return ", ".join(f"reinterpret_cast<unsigned char*>({place})" for place in [*places, "0ull"])

    return (
        f"{{ unsigned char* const given[] = {{{pointers(given)}}}; unsigned char* const got[] = {{{pointers(results)}}}; "
        f"f_{_safe(target)}(c, given, got); }}"
    )


def _reachable(module: Module, entry: str) -> list[Function]:
    found, waiting = [], [entry]
    while waiting:
        function = module.functions[waiting.pop()]
        if function in found:
            continue
        found.append(function)
        for statement in function.body:
            if isinstance(statement, Instruction) and statement.opcode.split(".")[0] == "call":
                waiting += [word for word in statement.operands if word in module.functions]
    return found


def _uses(functions: list[Function], name: str) -> bool:
    pattern = re.compile(rf"(?<![\w$]){re.escape(name)}(?![\w$])")
    return any(
        pattern.search(operand)
        for function in functions
        for statement in function.body
        if isinstance(statement, Instruction)
        for operand in statement.operands
    )


def _safe(name: str) -> str:
    return name.replace("$", "_")
