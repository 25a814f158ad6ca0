"""Launches of large models in large steps stay within what CUDA takes: grids, threads, bytes of arguments, ints of 32 bits.

https://docs.nvidia.com/cuda/cuda-c-programming-guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_shapes import RecordingDevice, shape_graph
from tiny_models import TinyShape

from pyinfer.graph.backend import StageConfig
from pyinfer.kernels_gpu.cuda_launch import as_word
from pyinfer.kernels_gpu.launch import Gemm, Launch
from pyinfer.kernels_gpu.lower import lower
from pyinfer.kernels_gpu.program import ProgramShape
from pyinfer.kernels_gpu.stage_memory import StageMemory

pytestmark = pytest.mark.backend

LLAMA_70B = TinyShape(n_layers=1, n_embd=8192, n_ff=28672, n_heads=64, n_kv_heads=8, head_dim=128, n_ctx=131072)
GEMMA_27B = TinyShape(n_layers=6, n_embd=5376, n_ff=21504, n_heads=32, n_kv_heads=16, head_dim=128, n_ctx=131072)
QWEN_30B_A3B = TinyShape(
    n_layers=1, n_embd=2048, n_ff=768, n_heads=32, n_kv_heads=4, head_dim=128, n_ctx=131072, n_experts=128, n_used=8
)
MODELS = {
    "llama": (LLAMA_70B, "Q4_K"),
    "gemma3": (GEMMA_27B, "Q6_K"),
    "qwen3moe": (QWEN_30B_A3B, "Q4_K"),
}


def kind_of(kind: str) -> Any:
    return lambda name: "F32" if "gate_inp" in name else kind


@pytest.mark.parametrize("max_tokens", [8192, 65_535])
@pytest.mark.parametrize("name", MODELS)
def test_large_steps(name: str, max_tokens: int) -> None:
    shape, kind = MODELS[name]
    graph = shape_graph(name, kind_of(kind), shape)
    config = StageConfig(n_pages=2_000_000, max_tokens=max_tokens, max_sequences=256, n_ctx=131_072)
    memory = StageMemory(RecordingDevice(), graph, config)
    shapes = [ProgramShape("decode", n, n, n, all_rows=True) for n in (1, 8, 256)]
    shapes += [ProgramShape(kind, max_tokens, 256, 256) for kind in ("prompt", "mixed")]
    for step in (step for each in shapes for step in lower(memory, each).steps):
        if isinstance(step, Gemm):
            assert max(step.m, step.n, step.k, step.w_stride, step.out_stride) < 2**31
        if isinstance(step, Launch):
            check(step)


def check(launch: Launch) -> None:
    x, y, z = launch.grid
    assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, launch
    assert np.prod(launch.block) <= 1024 and launch.block[2] <= 64, launch
    sizes = [8 if type(as_word(arg)).__name__ in ("c_void_p", "c_long") else 4 for arg in launch.args]
    assert sum(size + size % 8 for size in sizes) <= 4096, launch
