"""NVRTC on attention over pages of q8_0 and bf16, which `test_gpu_compile` leaves out: it keeps to registers and fits."""

from __future__ import annotations

from typing import NamedTuple

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
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.nvrtc import NVRTC, load_nvrtc, read_resources
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.pages import KVPool, LayerPages
from pyinfer.kernels_gpu.rope import HeadNorms, HeadShape
from pyinfer.kernels_gpu.step_buffer import StepFields

pytestmark = pytest.mark.backend
ANY = Buffer(4096, 1 << 40)
FIELDS = StepFields(ANY, ANY, ANY, ANY, ANY, ANY, ANY, 512)
POOL = KVPool(ANY, ANY, 1, 1)


class Card(NamedTuple):
    arch: int
    n_sms: int
    shared_bytes: int


T4, A100, H200 = Card(75, 40, 64 << 10), Card(80, 108, 163 << 10), Card(90, 132, 227 << 10)


@pytest.fixture(scope="module")
def nvrtc() -> NVRTC:
    try:
        return load_nvrtc()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("card", "types", "kind", "n_tokens"),
    [
        (T4, ("q8_0", "q8_0"), "decode", 1),
        (T4, ("q8_0", "f16"), "prompt", 64),
        (A100, ("bf16", "bf16"), "mixed", 512),
        (H200, ("q8_0", "q8_0"), "decode", 32),
        (H200, ("q8_0", "q8_0"), "prompt", 2048),
        (H200, ("q8_0", "q8_0"), "prompt", 32),
    ],
)
def test_attention_over_other_pages(
    nvrtc: NVRTC, card: Card, types: tuple[str, str], kind: StepKind, n_tokens: int
) -> None:
    device = EmulatedDevice(arch=card.arch, n_sms=card.n_sms, shared_bytes=card.shared_bytes)
    shape = AttentionShape(HeadShape(32, 8, 128, 16), 0.1, None, 131072)
    fused = FusedRope(ANY, ANY, Rope(128, "half", 1e6), ANY, HeadNorms(ANY, ANY, 1e-6)) if kind == "decode" else None
    launches = build_attention(
        Operand("f32", 4096, ANY), ANY, shape, StepShape(kind, n_tokens, 256), FIELDS, LayerPages(POOL, POOL, *types), device,
        AttentionScratch(ANY, ANY, None), fused,
    )  # fmt: skip
    for launch in launches:
        text = unit_text(unit_of(launch.kernel))
        binary = nvrtc.compile(text, launch.kernel.source, card.arch, ("--ptxas-options=-v",))
        (found,) = read_resources(binary.log)
        # a few bytes are put by where that makes room for one block more
        assert found.spill_bytes <= 32, (str(launch.kernel), found)
        assert found.registers * launch.block[0] <= 65536 and found.shared_bytes <= 48 << 10
        assert found.shared_bytes + launch.shared_bytes <= card.shared_bytes
