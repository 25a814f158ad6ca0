"""What a kernel's machine code costs, without a GPU: compiled by NVRTC, disassembled, its innermost loops counted by pipe.

Cycles are those of one scheduler (a quarter of a multiprocessor) for one warp instruction, from the throughput table of the CUDA
C++ programming guide ("Arithmetic Instructions", compute capability 9.0): one instruction is issued a cycle; the pipe of integers
and the one of integer products and dp4a take two cycles each, conversions that are not I2FP eight, shuffles four. Loads and
stores of memory count 128 bytes a cycle of the whole multiprocessor: 16 bytes a lane are four turns of all its schedulers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyinfer.kernels_gpu.kernel_cache import unit_of, unit_text
from pyinfer.kernels_gpu.launch import Kernel
from pyinfer.kernels_gpu.nvrtc import Resources, load_nvrtc, read_resources

PIPES = ("issue", "alu", "imad", "fma", "slow", "lsu", "mma")
_ALU = ("LOP3", "SHF", "ISETP", "SEL", "IADD3", "VIADD", "VIADDMNMX", "VIMNMX", "IMNMX", "LEA", "I2FP", "PRMT", "FSETP", "FMNMX",
        "FSEL", "PLOP3", "POPC", "BMSK", "SGXT", "P2R", "R2P", "MOV", "LOP", "F2FP", "FLO")  # fmt: skip
_IMAD, _FMA = ("IMAD", "IDP"), ("FFMA", "FMUL", "FADD", "HADD2", "HMUL2", "HFMA2", "FSWZADD")
_SLOW = ("MUFU", "I2F", "F2I", "F2F", "FRND", "SHFL", "S2R", "DADD", "DMUL", "DFMA")
_MEMORY = ("LDS", "LDG", "LDGSTS", "STS", "STG", "LDSM", "LD", "ST")
_MMA = {"HMMA": 7, "IMMA": 7}  # cycles of 16 x 8 x 16 float16, 16 x 8 x 32 int8: wgmma would take four for as much
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[\w.]+)(?P<rest>.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")

Cycles = Counter[str]  # by pipe


@dataclass(frozen=True)
class Code:
    """One kernel: what a turn of its largest innermost loop costs, one of the loops around it, and all the rest once.

    What stands behind the last exit are paths that are hardly ever taken, as of divisions by denormal numbers.
    """

    resources: Resources
    loop: Cycles
    around: Cycles
    rest: Cycles
    instructions: Counter[str]  # of the loop, by name


def find_disassembler(given: str | None) -> str:
    """nvdisasm of a CUDA toolkit or of the triton wheel; SystemExit if there is none."""
    found = given or shutil.which("nvdisasm")
    if not found:
        raise SystemExit(
            "no nvdisasm is on PATH; give --nvdisasm FILE (it comes with the CUDA toolkit, and with triton)"
        )
    return found


@lru_cache(maxsize=512)
def code_of(kernel: Kernel, arch: int, disassembler: str, wide_conflict: int = 1) -> Code:
    """`wide_conflict`: turns that a load of 16 bytes a lane from global memory takes for each that it could."""
    binary = load_nvrtc().compile(unit_text(unit_of(kernel)), kernel.source, arch, ("--ptxas-options=-v",))
    (resources,) = (each for each in read_resources(binary.log) if each.name == kernel.name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.code)
        text = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions, loops = _parse(_function(text, kernel.name))
    inner = [(a, b) for a, b in loops if not any((a, b) != o and a <= o[0] and o[1] <= b for o in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    products = [i for i, (op, _) in enumerate(instructions) if op.startswith("HMMA")]
    if products:  # behind the last one of the loop is what a tile's end takes, loops of its own included
        counts = {loop: sum(loop[0] <= i <= loop[1] for i in products) for loop in loops}
        first, last = max(loops, key=lambda loop: (counts[loop], loop[0] - loop[1]), default=(first, last))
        last = max((i for i in products if first <= i <= last), default=last)
    exits = [i for i, (op, always) in enumerate(instructions) if op == "EXIT" and always and i > last]
    ops = [op for op, _ in instructions]
    end = min(exits, default=len(ops))
    start, stop = max(
        ((a, b) for a, b in loops if a <= first and last <= b),
        key=lambda loop: loop[1] - loop[0],
        default=(first, last),
    )
    stop = min(stop, end - 1)
    parts = ops[first : last + 1], ops[start:first] + ops[last + 1 : stop + 1], ops[:start] + ops[stop + 1 : end]
    names = Counter(op.split(".")[0] for op in parts[0])
    loop, around, rest = (_cycles(part, wide_conflict) for part in parts)
    return Code(resources, loop, around, rest, names)


def _function(text: str, name: str) -> list[str]:
    part = text.split(f".section\t.text.{name},", 1)[1]
    return part.split("\n//-----", 1)[0].splitlines()


def _parse(lines: Iterable[str]) -> tuple[list[tuple[str, bool]], list[tuple[int, int]]]:
    """(opcode, without a predicate) in order, and (first, last) of each loop: from a branch's target up to the branch."""
    instructions: list[tuple[str, bool]] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            if found["op"].startswith("BRA") and (target := re.search(r"\.L_x_\d+", found["rest"])):
                branches.append((len(instructions), target[0]))
            instructions.append((found["op"], "@" not in found[0]))
    loops = {(labels[target], at) for at, target in branches if labels.get(target, at) < at}
    return instructions, sorted(loops)


def _cycles(ops: Sequence[str], wide_conflict: int) -> Cycles:
    total: Cycles = Counter(issue=len(ops))
    for op in ops:
        name, *parts = op.split(".")
        if name in _ALU:
            total["alu"] += 2
        elif name in _IMAD:
            total["imad"] += 2
        elif name in _FMA:
            total["fma"] += 1
        elif name in _SLOW:
            total["slow"] += 4 if name == "SHFL" else 8
        elif name in _MMA:
            total["mma"] += _MMA[name]
        elif name in _MEMORY:
            turns = 4 if "128" in parts or name == "LDSM" else 2 if "64" in parts else 1
            total["lsu"] += 4 * turns * (wide_conflict if name == "LDG" and turns == 4 else 1)
    return total
