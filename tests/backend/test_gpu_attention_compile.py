"""NVRTC on the kernels of rows, rope and attention at the sizes of real models: they compile and keep to registers."""

from __future__ import annotations

import pytest
from cuda_emulator.device import EmulatedDevice

from pyinfer.errors import BackendError
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.attention import (
    AttentionScratch,
    AttentionShape,
    FusedRope,
    StepKind,
    StepShape,
    build_attention,
)
from pyinfer.kernels_gpu.kernel_cache import unit_of, unit_text
from pyinfer.kernels_gpu.launch import Buffer, Launch
from pyinfer.kernels_gpu.nvrtc import NVRTC, load_nvrtc, read_resources
from pyinfer.kernels_gpu.operand import Form, Operand
from pyinfer.kernels_gpu.pages import KVPool, LayerPages
from pyinfer.kernels_gpu.rope import HeadNorms, HeadShape, build_rope_angles, build_rope_store
from pyinfer.kernels_gpu.rows import BeforeNorm, build_gated, build_rms_norm
from pyinfer.kernels_gpu.step_buffer import StepFields

pytestmark = pytest.mark.backend
SHARED = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}  # KiB that a block may have
ANY = Buffer(4096, 1 << 40)
FIELDS = StepFields(ANY, ANY, ANY, ANY, ANY, ANY, ANY, 512)


@pytest.fixture(scope="module")
def nvrtc() -> NVRTC:
    try:
        return load_nvrtc()
    except BackendError as error:
        pytest.skip(str(error))


def pages_of(k_type: str, v_type: str) -> LayerPages:
    return LayerPages(KVPool(ANY, ANY, 1, 1), KVPool(ANY, ANY, 1, 1), k_type, v_type)


def check(nvrtc: NVRTC, arch: int, launches: list[Launch], spills: int = 0) -> None:
    """On sm_75 and sm_80 ptxas spills a few bytes to hold three blocks: `spills` allows so many."""
    for launch in launches:
        text = unit_text(unit_of(launch.kernel))
        binary = nvrtc.compile(text, launch.kernel.source, arch, ("--ptxas-options=-v",))
        found = {resources.name: resources for resources in read_resources(binary.log)}[launch.kernel.name]
        threads = launch.block[0]
        assert found.spill_bytes <= spills, (arch, str(launch.kernel), found)
        assert found.registers * threads <= 65536 and found.shared_bytes <= 48 << 10
        assert found.shared_bytes + launch.shared_bytes <= SHARED[arch]


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head", "kv_type"), [(32, 8, 128, "f16"), (4, 1, 256, "q8_0")])
def test_attention(nvrtc: NVRTC, arch: int, n_heads: int, n_kv_heads: int, head: int, kv_type: str) -> None:
    device = EmulatedDevice(arch=arch, n_sms=108, shared_bytes=SHARED[arch])
    shape = AttentionShape(HeadShape(n_heads, n_kv_heads, head, 16), head**-0.5, 4096 if head == 256 else None, 131072)
    pages, scratch = pages_of(kv_type, kv_type), AttentionScratch(ANY, ANY, ANY)
    width, fused = n_heads * head, FusedRope(ANY, ANY, Rope(head, "half", 1e6), ANY, HeadNorms(ANY, ANY, 1e-6))
    steps: list[tuple[StepKind, int]] = [("decode", 1), ("prompt", 2048)]
    for kind, n_tokens in steps:
        out = Operand("a8" if kind == "decode" else "h16", width, ANY, ANY, ANY)
        step = StepShape(kind, n_tokens, 256)
        rope = fused if kind == "decode" else None
        launches = build_attention(out, ANY, shape, step, FIELDS, pages, device, scratch, rope)
        check(nvrtc, arch, launches, spills=32 if arch < 90 else 0)


def test_attention_of_bf16(nvrtc: NVRTC) -> None:
    arch = 80
    device = EmulatedDevice(arch=arch, n_sms=108, shared_bytes=SHARED[arch])
    shape = AttentionShape(HeadShape(32, 8, 128, 16), 0.1, None, 131072)
    pages, scratch, out = pages_of("bf16", "bf16"), AttentionScratch(ANY, ANY, ANY), Operand("f32", 4096, ANY)
    step = StepShape("mixed", 512, 256)
    check(nvrtc, arch, build_attention(out, ANY, shape, step, FIELDS, pages, device, scratch), spills=32)


@pytest.mark.parametrize("arch", SHARED)
def test_rows_and_rope(nvrtc: NVRTC, arch: int) -> None:
    rope, heads = Rope(128, "interleaved", 5e5), HeadShape(32, 8, 128, 16)
    launches = build_rope_angles(ANY, rope, ANY, FIELDS, 512)
    norms = HeadNorms(ANY, ANY, 1e-6)
    pages = pages_of("q8_0", "bf16")
    launches += build_rope_store(ANY, ANY, ANY, ANY, heads, rope, ANY, FIELDS, pages, 512, norms)
    forms: list[tuple[Form, int]] = [("a8", 1), ("h16", 512)]
    for form, n_rows in forms:
        out = Operand(form, 4096, ANY, ANY, ANY)
        launches += build_rms_norm(out, ANY, ANY, 1e-5, n_rows, BeforeNorm(ANY, ANY, ANY, 1e-5))
        launches += build_gated(Operand(form, 14336, ANY, ANY, ANY), ANY, ANY, "gelu_tanh", n_rows)
    check(nvrtc, arch, launches)
