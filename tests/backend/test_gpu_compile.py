"""Every kernel that lowering asks for, at real models' shapes, compiled by NVRTC for three architectures: what it takes.

Results are kept under PYINFER_HOME/tests by a hash of all that goes in, so that only what changed is compiled again. With
`-rP` the table is shown: registers of a thread, bytes spilled, shared memory. All types and sizes are in the `large` tier.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import pytest
from gpu_shapes import RecordingDevice, kernels_of, shape_graph
from tiny_models import TinyShape

from pyinfer.errors import BackendError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.graph.tensor_split import shard_graph
from pyinfer.kernels_gpu.kernel_cache import unit_of, unit_text
from pyinfer.kernels_gpu.launch import Kernel, Launch
from pyinfer.kernels_gpu.nvrtc import FLAGS, NVRTC, Resources, load_nvrtc, read_resources
from pyinfer.kernels_gpu.program import ProgramShape
from pyinfer.kernels_gpu.weights_layout import KINDS
from pyinfer.paths import home

pytestmark = pytest.mark.backend

CACHE = home() / "tests" / "nvrtc"
# arch -> multiprocessors and shared memory of a block of a card of that kind: T4, A100, H200
CARDS = {75: (40, 64 << 10), 80: (108, 163 << 10), 90: (132, 227 << 10)}
REGISTERS = 65536  # of a multiprocessor
FEW_SPILLS = 64  # bytes: what ptxas may put by outside of loops
LLAMA_8B = TinyShape(n_layers=2, n_embd=4096, n_ff=14336, n_heads=32, n_kv_heads=8, head_dim=128, n_ctx=8192)
GEMMA_270M = TinyShape(n_layers=2, n_embd=640, n_ff=2048, n_heads=4, n_kv_heads=1, head_dim=256, n_ctx=8192)
SMOL_135M = TinyShape(n_layers=2, n_embd=576, n_ff=1536, n_heads=9, n_kv_heads=3, head_dim=64, n_ctx=2048)
QWEN_8B = TinyShape(n_layers=2, n_embd=4096, n_ff=12288, n_heads=32, n_kv_heads=8, head_dim=128, n_ctx=8192)
QWEN_30B_A3B = TinyShape(
    n_layers=2, n_embd=2048, n_ff=768, n_heads=32, n_kv_heads=4, head_dim=128, n_ctx=8192, n_experts=128, n_used=8
)
CONFIG = StageConfig(n_pages=64, max_tokens=2048, max_sequences=128, n_ctx=8192)


def q4_k_m(name: str) -> str:
    """As most files called Q4_K_M have it."""
    return "Q6_K" if any(part in name for part in ("attn_v", "ffn_down", "token_embd", "output.weight")) else "Q4_K"


def programs(rows: Iterable[int], prompts: Iterable[int]) -> list[ProgramShape]:
    found = [ProgramShape("decode", n, n, n, all_rows=True) for n in rows]
    found += [ProgramShape("prompt", n, 1, 1) for n in prompts]
    return [*found, *(ProgramShape("mixed", n, 8, 8) for n in prompts)]


@pytest.fixture(scope="module")
def nvrtc() -> NVRTC:
    try:
        return load_nvrtc()
    except BackendError as error:
        pytest.skip(str(error))


def resources_of(nvrtc: NVRTC, kernel: Kernel, arch: int) -> Resources:
    """Compiled now or before."""
    text = unit_text(unit_of(kernel))
    key = hashlib.sha256(f"{nvrtc.version} {FLAGS} {arch} {kernel.name} {text}".encode()).hexdigest()[:32]
    path = CACHE / f"{key}.json"
    if path.exists():
        return Resources(*json.loads(path.read_text()))
    binary = nvrtc.compile(text, kernel.source, arch, ("--ptxas-options=-v",))
    (found,) = (each for each in read_resources(binary.log) if each.name == kernel.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}-{id(found)}")
    partial.write_text(json.dumps(astuple(found)))
    os.replace(partial, path)
    return found


def check(nvrtc: NVRTC, kernels: dict[Kernel, Launch], arch: int) -> None:
    """All compile, fit on a multiprocessor and keep their values in registers."""
    _, shared_bytes = CARDS[arch]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda kernel: resources_of(nvrtc, kernel, arch), kernels))
    lines = []
    for (kernel, launch), found in zip(kernels.items(), results, strict=True):
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        shared = found.shared_bytes + launch.shared_bytes
        lines.append(f"sm_{arch} {found.registers:4} regs {found.spill_bytes:4} spilled {shared:7} shared  {kernel}")
        assert found.registers * threads <= REGISTERS, lines[-1]
        assert found.spill_bytes <= FEW_SPILLS, lines[-1]
        assert found.shared_bytes <= 48 << 10 and shared <= shared_bytes, lines[-1]
    print("\n".join(lines))


def lowered(
    graph: Graph, arch: int, shapes: Iterable[ProgramShape], config: StageConfig = CONFIG
) -> dict[Kernel, Launch]:
    n_sms, shared_bytes = CARDS[arch]
    return kernels_of(graph, RecordingDevice(arch, n_sms, shared_bytes), shapes, config)


@pytest.mark.parametrize("arch", CARDS)
def test_llama_8b_in_q4_k_m(nvrtc: NVRTC, arch: int) -> None:
    kernels = lowered(shape_graph("llama", q4_k_m, LLAMA_8B), arch, programs((1, 8, 32), (512,)))
    assert {kernel.source for kernel in kernels} >= {
        "embed.cu", "rows.cu", "rope.cu", "gemv.cu", "attention_decode.cu", "attention_prefill.cu", "matmul_mma.cu",
    }  # fmt: skip
    check(nvrtc, kernels, arch)


@pytest.mark.parametrize("arch", CARDS)
def test_a_mixture_of_experts(nvrtc: NVRTC, arch: int) -> None:
    def kind_of(name: str) -> str:
        return "F32" if "gate_inp" in name else q4_k_m(name)

    graph = shape_graph("qwen3moe", kind_of, QWEN_30B_A3B)
    kernels = lowered(graph, arch, programs((1, 8, 64), (512,)))
    of_experts = {
        kernel: launch
        for kernel, launch in kernels.items()
        if kernel.source == "expert_mma.cu" or {"EXPERTS", "N_EXPERTS", "N_USED"} & dict(kernel.defines).keys()
    }
    names = ["expert_mma", "gemv_experts", "gemv_gated_experts", "rms_norm", "route_experts", "sort_slots"]
    assert sorted({kernel.name for kernel in of_experts}) == names
    check(nvrtc, of_experts, arch)


def test_a_rank_of_a_tensor_split(nvrtc: NVRTC) -> None:
    file_graph = shape_graph("llama", "Q8_0", SMOL_135M, optimized=False)
    graph = optimize(shard_graph(file_graph, 3)[1])
    kernels = lowered(graph, 90, programs((1,), ()))
    check(nvrtc, {kernel: launch for kernel, launch in kernels.items() if kernel.source == "ranks.cu"}, 90)
    assert any(kernel.source == "ranks.cu" for kernel in kernels)


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("Q4_K", "Q6_K")])
def test_other_types(nvrtc: NVRTC, kind: str, arch: int) -> None:
    """One token and sixteen."""
    graph = shape_graph("llama", kind, LLAMA_8B)
    products = {
        kernel: launch
        for kernel, launch in lowered(graph, arch, programs((1, 16), ())).items()
        if kernel.source in ("gemv.cu", "matmul_mma.cu", "embed.cu")
    }
    check(nvrtc, products, arch)


@pytest.mark.large
@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("kind", [q4_k_m, *KINDS], ids=lambda kind: "q4_k_m" if callable(kind) else kind)
def test_all_sizes(nvrtc: NVRTC, kind: str | Callable[[str], str], arch: int) -> None:
    graph = shape_graph("llama", kind, LLAMA_8B)
    shapes = programs((*range(1, 9), 16, 32, 64, 128), (5, 16, 64, 256, 512, 2048))
    check(nvrtc, lowered(graph, arch, shapes), arch)


@pytest.mark.large
@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "f32", "q8_0", "q8_0,f16"])
@pytest.mark.parametrize(
    "name, shape", [("gemma3", GEMMA_270M), ("llama", SMOL_135M), ("qwen2", QWEN_8B), ("qwen3", QWEN_8B)]
)
def test_other_models(nvrtc: NVRTC, name: str, shape: TinyShape, kv_dtype: str, arch: int) -> None:
    config = StageConfig(n_pages=64, max_tokens=512, max_sequences=64, n_ctx=2048, kv_dtype=kv_dtype)
    graph = shape_graph(name, "Q8_0", shape)
    check(nvrtc, lowered(graph, arch, programs((1, 2, 8, 64), (32, 512)), config), arch)


def test_what_was_compiled_is_kept(nvrtc: NVRTC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CACHE", tmp_path)
    kernel = Kernel("rope.cu", "rope_angles")
    found = resources_of(nvrtc, kernel, 80)
    monkeypatch.setattr(NVRTC, "compile", lambda *_: pytest.fail("compiled again"))
    assert resources_of(nvrtc, kernel, 80) == found and found.name == "rope_angles"
