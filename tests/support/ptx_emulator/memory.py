"""Instructions that touch memory: PTX ISA 8.8, "ld", "st", "cvta", "atom", "red", "cp.async", "membar", "fence"."""

from __future__ import annotations

from ptx_emulator.operands import C_TYPES, Operation, rule

_SPACES = {
    "global": "global_memory", "shared": "shared_memory", "shared::cta": "shared_memory", "local": "local_memory",
    "const": "const_memory", None: "generic_memory",
}  # fmt: skip
_ORDERS = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile")
_SCOPES = {"cta": 0, "cluster": 1, "gpu": 1, "sys": 2}
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::no_allocate", "L1::evict_first", "L1::evict_last", "L1::evict_normal",
          "L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B")  # fmt: skip
_WIDTH = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}


def _width(kind: str) -> int:
    return _WIDTH.get(kind) or (8 if kind.endswith("64") else 4)


def _access(op: Operation) -> tuple[str, str, int, str]:
    """Type, checking function, number of elements and the fences that its order needs."""
    kind = op.kind()
    space = op.take("global", "shared", "shared::cta", "local", "const", "param")
    order, scope = op.take(*_ORDERS), op.take(*_SCOPES)
    while op.take(*_CACHE):
        pass
    read_only = op.flag("nc")
    if read_only and (space != "global" or op.base != "ld"):
        raise op.error("an unknown .nc")
    vector = op.take("v2", "v4")
    op.finish(2)
    fences = f"fence(c, {op.line}, {_SCOPES[scope or 'sys']}); " if order in ("acquire", "release", "acq_rel") else ""
    memory = "read_only_memory" if read_only else "param" if space == "param" else _SPACES[space]
    return kind, memory, int(vector[1]) if vector else 1, fences


@rule("ld")
def _load(op: Operation) -> str:
    kind, memory, n, fences = _access(op)
    element, n_bytes = C_TYPES[kind], n * _width(kind)
    parts = op.vector(0) or [op.operands[0]]
    if len(parts) != n:
        raise op.error(f"{len(parts)} registers for {n} elements")
    place = op.address(op.operands[1])
    if memory == "param":
        pointer = f"reinterpret_cast<const unsigned char*>({place})"
    else:
        pointer = f"{memory}(c, {op.line}, {place}, {n_bytes}, 'r')"
    if n == 1:
        return op.assign(parts[0], f"fetch<{element}>({pointer})") + fences
    writes = " ".join(op.assign(part, f"loaded.v[{i}]") for i, part in enumerate(parts))
    return f"{{ const auto loaded = fetch<Vector<{element}, {n}>>({pointer}); {writes} }}{fences}"


@rule("st")
def _store(op: Operation) -> str:
    kind, memory, n, fences = _access(op)
    element, n_bytes = C_TYPES[kind], n * _width(kind)
    parts = op.vector(1) or [op.operands[1]]
    if len(parts) != n:
        raise op.error(f"{len(parts)} registers for {n} elements")
    place = op.address(op.operands[0])
    if memory == "const_memory":
        raise op.error("a store to constants")
    if memory == "param":
        pointer = f"reinterpret_cast<unsigned char*>({place})"
    else:
        pointer = f"{memory}(c, {op.line}, {place}, {n_bytes}, 'w')"
    values = ", ".join(op.value(part, kind) for part in parts)
    if n == 1:
        return f"{fences}store<{element}>({pointer}, {values});"
    return f"{fences}{{ const Vector<{element}, {n}> stored = {{{{{values}}}}}; store({pointer}, stored); }}"


@rule("cvta")
def _convert_address(op: Operation) -> str:
    """Only shared memory has another generic address; what is converted to it must be one."""
    kind = op.kind("u64", "u32")
    to, space = op.flag("to"), op.take("global", "shared", "shared::cta", "local", "const")
    op.finish(2)
    if kind != "u64" or space is None:
        raise op.error("an unknown address")
    value = op.get(1, "u64")
    if space.startswith("shared"):
        value = f"({value} {'-' if to else '+'} kWindow)"
    return op.put(0, value)


@rule("atom", "red")
def _atomic(op: Operation) -> str:
    kind = op.kind()
    space, scope = op.take("global", "shared", "shared::cta"), op.take(*_SCOPES)
    order = op.take("relaxed", "acquire", "release", "acq_rel")
    action = op.take("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    first = 1 if op.base == "atom" else 0
    op.finish(first + (3 if action == "cas" else 2))
    if kind in ("f16", "f16x2", "bf16", "bf16x2", "b16") or action is None:
        raise op.error("an unknown atomic")
    number = {"min": "least", "max": "most"} if kind in ("f32", "f64") else {"min": "lesser", "max": "larger"}
    b = op.get(first + 1, kind)
    new = {
        "add": "add(old, b)", "min": f"{number['min']}(old, b)", "max": f"{number['max']}(old, b)", "and": "old & b",
        "or": "old | b", "xor": "old ^ b", "exch": "b", "cas": "old == b ? d : old", "inc": "old >= b ? 0 : old + 1",
        "dec": "old == 0 || old > b ? b : old - 1",
    }[action].replace("old & b", "(old & b)")  # fmt: skip
    swap = f"const auto d = {op.get(first + 2, kind)}; " if action == "cas" else ""
    target = C_TYPES[kind]
    pointer = f"{_SPACES[space]}(c, {op.line}, {op.address(op.operands[first])}, {_width(kind)}, 'a')"
    fence = f"fence(c, {op.line}, {_SCOPES[scope or 'gpu']}); "
    call = f"atomic<{target}>({pointer}, [&]({target} old) {{ return {target}({new}); }})"
    result = op.put(0, call) if first else f"{call};"
    before = fence if order in ("release", "acq_rel") else ""
    after = fence if order in ("acquire", "acq_rel") else ""
    return f"{{ const auto b = {b}; {swap}{before}{result}{after} }}"


@rule("membar", "fence")
def _fence(op: Operation) -> str:
    scopes = {"cta": 0, "gl": 1, "sys": 2} if op.base == "membar" else _SCOPES
    if op.base == "fence" and op.take("sc", "acq_rel", "acquire", "release") is None:
        raise op.error("an unknown fence")
    scope = op.take(*scopes)
    op.finish(0)
    if scope is None:
        raise op.error("no scope")
    return f"fence(c, {op.line}, {scopes[scope]});"


@rule("cp")
def _copy(op: Operation) -> str:
    if not op.flag("async"):
        raise op.error("an unknown copy")
    if op.flag("commit_group"):
        op.finish(0)
        return "cp_async_commit(c);"
    if op.flag("wait_all"):
        op.finish(0)
        return f"cp_async_wait_all(c, {op.line});"
    if op.flag("wait_group"):
        op.finish(1)
        return f"cp_async_wait(c, {op.line}, {int(op.operands[0])});"
    cache, shared, source = op.take("ca", "cg"), op.take("shared", "shared::cta"), op.flag("global")
    op.take("L2::64B", "L2::128B", "L2::256B")
    op.finish()
    n_bytes = int(op.operands[2]) if len(op.operands) in (3, 4) else 0
    if not shared or not source or n_bytes not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise op.error("an unknown copy")
    n_read = op.get(3, "u32") if len(op.operands) == 4 else f"{n_bytes}u"
    shared_place, place = op.address(op.operands[0]), op.address(op.operands[1])
    return f"cp_async(c, {op.line}, {shared_place}, {place}, {n_bytes}, {n_read});"


@rule("prefetch", "prefetchu")
def _prefetch(op: Operation) -> str:
    op.take("global"), op.take("L1", "L2")
    op.finish(1)
    return ";"
