"""Kernels for CPUs that are not here: LLVM must select the instruction that each path is named for."""

from __future__ import annotations

import llvmlite.binding as llvm
import pytest

from pyinfer.kernels_cpu.attention import attention_body
from pyinfer.kernels_cpu.compiler import Body, emit_ir
from pyinfer.kernels_cpu.expert_rows import combine_body, gather_body, place_body
from pyinfer.kernels_cpu.isa import ISA, available
from pyinfer.kernels_cpu.matmul_block import emit_block_tile, matmul_body
from pyinfer.kernels_cpu.matmul_experts import expert_matmul_body
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.route_experts import route_body

pytestmark = pytest.mark.backend

TARGETS = {
    "neon": (ISA("neon", 4, "sdot", True, "neoverse-n1", "+neon,+dotprod"), "aarch64-linux-gnu", "sdot"),
    "avxvnni": (ISA("avxvnni", 8, "vpdpbusd", True, "alderlake", ""), "x86_64-linux-gnu", "{vex}\tvpdpbusd"),
    "avx2": (ISA("avx2", 8, "vpmaddubsw", True, "haswell", ""), "x86_64-linux-gnu", "vpmaddubsw"),
}


def assembly(isa: ISA, triple: str, text: str) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=isa.cpu, features=isa.features, opt=3)
    module = llvm.parse_assembly(text)
    module.triple = triple
    module.verify()
    return str(machine.emit_assembly(module))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_matmul_uses_the_dot_instruction(name: str, kind: str) -> None:
    isa, triple, instruction = TARGETS[name]
    text = emit_ir("kernel", isa, matmul_body(emit_block_tile(BLOCK_SOURCES[kind]), "k"))
    code = assembly(isa, triple, text)
    assert code.count(instruction) >= 15 * 8  # tiles of 8, 4, 2 and 1 rows, 8 units of 4 columns at least


def test_neon_attention_compiles_without_library_calls() -> None:
    isa, triple, _ = TARGETS["neon"]
    code = assembly(isa, triple, emit_ir("kernel", isa, attention_body(64, "f16", "f16", 3)))
    assert "fcvtl" in code and "extendhfsf" not in code


@pytest.mark.parametrize(
    "body",
    [
        route_body("softmax"),
        place_body(),
        gather_body("a8"),
        combine_body(),
        expert_matmul_body(emit_block_tile(BLOCK_SOURCES["Q4_K"]), "q4_k"),
    ],
    ids=["route", "place", "gather", "combine", "matmul"],
)
def test_neon_kernels_of_experts_compile_without_library_calls(body: Body) -> None:
    isa, triple, _ = TARGETS["neon"]
    code = assembly(isa, triple, emit_ir("kernel", isa, body))
    called = {line.split()[1] for line in code.splitlines() if line.split()[:1] == ["bl"]}
    assert all("tile" in name for name in called), called


def test_numba_variables_choose_the_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CPU_NAME", "x86-64-v3")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2,+avx,+avx2,+fma,+f16c")
    assert available() == ("avx2", "portable")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2")
    assert available() == ("portable",)
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+neon,+dotprod")
    assert available() == ("neon", "portable")
