"""What an emulator forgives and a GPU does not: grids that are too large, kernels that overlap and do not wait."""

from __future__ import annotations

import re

import pytest
from gpu_shapes import RecordingDevice, shape_graph
from tiny_models import TinyShape

from pyinfer.graph.backend import StageConfig
from pyinfer.kernels_gpu.launch import Launch
from pyinfer.kernels_gpu.lower import lower
from pyinfer.kernels_gpu.program import ProgramShape
from pyinfer.kernels_gpu.sources import with_includes
from pyinfer.kernels_gpu.stage_memory import StageMemory

pytestmark = pytest.mark.unit

LLAMA_8B = TinyShape(n_layers=1, n_embd=4096, n_ff=14336, n_heads=32, n_kv_heads=8, head_dim=128, n_ctx=131072)
QWEN_30B_A3B = TinyShape(
    n_layers=1, n_embd=2048, n_ff=768, n_heads=32, n_kv_heads=4, head_dim=128, n_ctx=131072, n_experts=128, n_used=8
)
MODELS = {"llama": ("Q4_K", LLAMA_8B), "qwen3moe": ("Q6_K", QWEN_30B_A3B), "qwen2moe": ("F32", QWEN_30B_A3B)}
SHAPES = (
    ProgramShape("decode", 1, 1, 1, all_rows=True),
    ProgramShape("decode", 256, 256, 256, all_rows=True),
    ProgramShape("prompt", 65535, 1, 1),
    ProgramShape("mixed", 65535, 256, 256),
)


@pytest.fixture(scope="module", params=MODELS)
def launches(request: pytest.FixtureRequest) -> list[Launch]:
    """Of the smallest and the largest steps, with keys and values that prompts read on the tensor cores and others."""
    found = []
    for kv_dtype in ("f16", "f32"):
        config = StageConfig(n_pages=64, max_tokens=65535, max_sequences=256, n_ctx=131072, kv_dtype=kv_dtype)
        kind, shape = MODELS[request.param]
        memory = StageMemory(RecordingDevice(), shape_graph(request.param, kind, shape), config)
        found += [step for each in SHAPES for step in lower(memory, each).steps if isinstance(step, Launch)]
    return found


def test_launches_are_within_limits(launches: list[Launch]) -> None:
    for launch in launches:
        assert launch.grid[0] < 2**31 and max(launch.grid[1:]) < 2**16 and min(launch.grid) > 0, launch
        assert 0 < launch.block[0] * launch.block[1] * launch.block[2] <= 1024, launch
        assert launch.shared_bytes <= 227 << 10, launch
        assert all(abs(arg) < 2**31 for arg in launch.args if isinstance(arg, int)), launch


def functions(text: str) -> dict[str, str]:
    """Name -> body of what is defined at the left margin; those of one name together."""
    found: dict[str, str] = {}
    text = re.sub(r"__launch_bounds__\([^)]*\)\s*", "", text)
    for match in re.finditer(
        r"^(?!struct|namespace|template|enum|#|//)[^\n;={}]*?\b(\w+)\([^;{}]*\) *\{", text, re.MULTILINE
    ):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found[match[1]] = found.get(match[1], "") + text[match.end() : end]
    return found


def waits(name: str, bodies: dict[str, str], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function, or one that it calls, waits for the kernel before."""
    body = bodies.get(name, "")
    called = set(re.findall(r"\b(\w+)(?:<[^<>;]*>)?\(", body)) & bodies.keys() - seen - {name}
    return "wait_for_previous();" in body or any(waits(other, bodies, seen | {name}) for other in called)


def test_kernels_that_overlap_wait_for_the_one_before(launches: list[Launch]) -> None:
    kernels = {(launch.kernel.source, launch.kernel.name) for launch in launches if launch.overlap}
    assert len(kernels) >= 8
    for source, name in kernels:
        bodies = functions(with_includes(source))
        assert name in bodies and waits(name, bodies), f"{source}: {name}"


def test_a_kernel_that_does_not_wait_is_found() -> None:
    text = "DEVICE void f(int a) {\n  if (a) { g(a); }\n}\nDEVICE void g(int) { wait_for_previous(); }\nvoid k() { f<3>(1); }\n"
    assert waits("k", functions(text)) and not waits("k", functions(text.replace("wait_for_previous();", "")))
