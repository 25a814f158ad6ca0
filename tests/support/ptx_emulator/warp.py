"""Instructions at which threads meet, and the flow of control: PTX ISA 8.8, "Parallel Synchronization and Communication",
"Warp-Level Matrix", "Control Flow", "griddepcontrol"."""

from __future__ import annotations

from ptx_emulator.operands import Operation, rule

_SHUFFLES = {"up": "kUpward", "down": "kDownward", "bfly": "kButterfly", "idx": "kIndexed"}
# shape and types of a and b -> fragments, elements, depth, registers of a, b and c
_MMA = {
    ("m16n8k16", "f16"): ("A16x16, B16x8, C16x8, 16", 4, 2, 4),
    ("m16n8k16", "bf16"): ("A16x16, B16x8, C16x8, 16", 4, 2, 4),
    ("m16n8k8", "f16"): ("A16x8, B8x8, C16x8, 8", 2, 1, 4),
    ("m16n8k8", "bf16"): ("A16x8, B8x8, C16x8, 8", 2, 1, 4),
    ("m16n8k32", "8"): ("A16x32, B32x8, C16x8, 32", 4, 2, 4),
    ("m8n8k16", "8"): ("A8x16, B16x8Bytes, C8x8, 16", 1, 1, 2),
}
_ELEMENTS = {"f16": "HalfElement", "bf16": "BfloatElement", "s8": "ByteElement", "u8": "UnsignedByteElement"}


def _what(op: Operation, *, same_instruction: bool) -> str:
    """How a meeting is named: lanes meet in the same one only, an `.aligned` one is one instruction."""
    where = f" (line {op.line} of the PTX)" if same_instruction else ""
    return f'"{op.instruction.opcode}{where}"'


@rule("shfl")
def _shuffle(op: Operation) -> str:
    what = _what(op, same_instruction=False)
    op.kind("b32")
    sync, mode = op.flag("sync"), op.take(*_SHUFFLES)
    op.finish(5)
    if not sync or mode is None:
        raise op.error("an unknown shuffle")
    target, *predicate = op.operands[0].split("|")
    operands = ", ".join(op.get(i, "b32") for i in range(1, 5))
    call = f"shfl(c, {op.line}, {what}, {_SHUFFLES[mode]}, {operands}, &valid)"
    writes = op.assign(predicate[0], "valid") if predicate else ""
    return f"{{ bool valid; const uint32_t got = {call}; {op.assign(target, 'got')} {writes} }}"


@rule("vote")
def _vote(op: Operation) -> str:
    what = _what(op, same_instruction=False)
    kind, sync = op.kind("pred", "b32"), op.flag("sync")
    mode = op.take("ballot", "all", "any", "uni")
    op.finish(3)
    if not sync or (mode == "ballot") != (kind == "b32"):
        raise op.error("an unknown vote")
    mask = op.get(2, "b32")
    result = {
        "ballot": "voted", "all": f"voted == {mask}", "any": "voted != 0", "uni": f"voted == 0 || voted == {mask}",
    }[mode or "all"]  # fmt: skip
    call = f"ballot(c, {op.line}, {what}, {op.get(1, 'pred')}, {mask})"
    return f"{{ const uint32_t voted = {call}; {op.put(0, f'({result})')} }}"


@rule("match")
def _match(op: Operation) -> str:
    what = _what(op, same_instruction=False)
    kind = op.kind("b32", "b64")
    if not (op.flag("any") and op.flag("sync")):
        raise op.error("an unknown match")
    op.finish(3)
    return op.put(0, f"match_any(c, {op.line}, {what}, {op.get(1, kind)}, {op.get(2, 'b32')})")


@rule("redux")
def _reduce(op: Operation) -> str:
    what = _what(op, same_instruction=False)
    kind, sync = op.kind("u32", "s32", "b32"), op.flag("sync")
    action = op.take("add", "min", "max", "and", "or", "xor")
    op.finish(3)
    if not sync or action is None:
        raise op.error("an unknown reduction")
    new = {
        "add": "add(a, b)",
        "min": "lesser(a, b)",
        "max": "larger(a, b)",
        "and": "a & b",
        "or": "a | b",
        "xor": "a ^ b",
    }
    function = f"[](auto a, auto b) {{ return decltype(a)({new[action]}); }}"
    return op.put(0, f"redux(c, {op.line}, {what}, {op.get(1, kind)}, {op.get(2, 'b32')}, {function})")


@rule("activemask")
def _active(op: Operation) -> str:
    raise op.error("who is active is not known here")


@rule("bar", "barrier")
def _barrier(op: Operation) -> str:
    if op.flag("warp"):
        sync = op.flag("sync")
        op.finish(1)
        if not sync:
            raise op.error("an unknown barrier")
        return f"bar_warp(c, {op.line}, {op.get(0, 'b32')});"
    op.flag("cta")
    aligned = op.base == "bar" or op.flag("aligned")
    if not aligned:
        raise op.error("a barrier that is not .aligned")
    if op.flag("sync"):
        op.finish(1)
        return f"block_barrier(c, {op.line}, {4 * int(op.operands[0])}, false);"
    kind = op.kind("pred", "u32")
    action = op.flag("red") and op.take("popc", "and", "or")
    op.finish(3)
    if not action or (kind == "u32") != (action == "popc"):
        raise op.error("an unknown barrier")
    which = 4 * int(op.operands[1]) + {"popc": 1, "and": 2, "or": 3}[action]
    value = op.get(2, "pred")
    negated = "!" if action == "and" else ""
    result = {"popc": "uint32_t(sum)", "and": "bool(sum == 0)", "or": "bool(sum != 0)"}[action]
    return f"{{ const int sum = block_barrier(c, {op.line}, {which}, {negated}{value}); {op.put(0, result)} }}"


@rule("ldmatrix")
def _load_matrix(op: Operation) -> str:
    what = _what(op, same_instruction=True)
    op.kind("b16")
    known = op.flag("sync") and op.flag("aligned") and op.flag("m8n8") and op.take("shared", "shared::cta")
    n, transposed = op.take("x1", "x2", "x4"), op.flag("trans")
    op.finish(2)
    parts = op.vector(0) or [op.operands[0]]
    if not known or n is None or len(parts) != int(n[1]):
        raise op.error("an unknown ldmatrix")
    call = f"ldmatrix(c, {op.line}, {what}, {n[1]}, {str(transposed).lower()}, {op.address(op.operands[1])})"
    writes = " ".join(op.assign(part, f"got.v[{i}]") for i, part in enumerate(parts))
    return f"{{ const auto got = {call}; {writes} }}"


@rule("mma")
def _multiply(op: Operation) -> str:
    what = _what(op, same_instruction=True)
    c_kind, b_kind, a_kind, d_kind = (op.kind() for _ in range(4))
    known = op.flag("sync") and op.flag("aligned") and op.flag("row") and op.flag("col")
    shape = op.take("m16n8k16", "m16n8k8", "m16n8k32", "m8n8k16")
    op.finish(4)
    integers = a_kind in ("s8", "u8") and b_kind in ("s8", "u8")
    found = _MMA.get((shape or "", "8" if integers else a_kind))
    sums = "s32" if integers else "f32"
    if not known or found is None or (c_kind, d_kind) != (sums, sums) or not (integers or a_kind == b_kind):
        raise op.error("an unknown mma")
    fragments, *counts = found
    registers = [op.vector(i) or [] for i in (1, 2, 3, 0)]
    if [len(part) for part in registers] != [*counts, counts[2]]:
        raise op.error("a wrong number of registers")
    a, b, c = (", ".join(op.value(part, "b32") for part in parts) for parts in registers[:3])
    combine = f"mma_all<{_ELEMENTS[a_kind]}, {_ELEMENTS[b_kind]}, {fragments}>"
    writes = " ".join(op.assign(part, f"got.v[{i}]") for i, part in enumerate(registers[3]))
    given = f"const Fragments f = {{{{{a}}}, {{{b}}}, {{{c}}}}};"
    return f"{{ {given} const auto got = mma(c, {op.line}, {what}, f, {combine}); {writes} }}"


@rule("griddepcontrol")
def _dependent_launch(op: Operation) -> str:
    action = op.take("wait", "launch_dependents")
    op.finish(0)
    if action is None:
        raise op.error("an unknown action")
    return "grid_wait(c);" if action == "wait" else "launch_dependents(c);"


@rule("bra")
def _branch(op: Operation) -> str:
    op.flag("uni")
    op.finish(1)
    return f"goto {label(op.operands[0])};"


@rule("ret", "exit")
def _return(op: Operation) -> str:
    op.flag("uni")
    op.finish(0)
    return "goto end;"


@rule("trap", "brkpt")
def _trap(op: Operation) -> str:
    op.finish(0)
    return f'site = {op.line}; fail("a trap");'


def label(name: str) -> str:
    return "L" + name.replace("$", "_")
