"""A real model on the emulated GPU: as close to an exact run as llama.cpp is, and the CPU's greedy text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch, run_prompt
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from golden import golden_prompts

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.large,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not has_compiler, reason="there is no g++"),
]

CONFIG = StageConfig(n_pages=16, max_tokens=64, max_sequences=4, n_ctx=256, n_threads=2)
PAGES: list[int] = np.random.RandomState(0).permutation(16).tolist()
N_GREEDY = 32
NEARLY_EQUAL = 0.25  # two tokens whose logits are no further apart may change places


@pytest.fixture(scope="module")
def graph(model_path: Callable[[str], Path]) -> Graph:
    return optimize(build_graph(GGUFFile.open(model_path("smollm2"))))


@pytest.fixture(scope="module")
def stage(graph: Graph) -> Iterator[GPUStage]:
    stage = GPUStage(EmulatedDevice(n_sms=16, n_bytes=4 << 30), graph, CONFIG)
    yield stage
    stage.close()


def test_no_further_from_exact_than_llamacpp(stage: GPUStage) -> None:
    """Prompts whole, through tensor cores; one of them token by token, through int8 products."""
    prompts = golden_prompts("smollm2")
    ours = {
        name: prompts[name].kl(run_prompt(stage, prompts[name].ids, PAGES, 16)).mean() for name in ("facts", "story")
    }
    assert sum(ours.values()) <= 1.1 * sum(prompts[name].llamacpp_kl for name in ours), ours
    alone = prompts["chat"].kl(run_prompt(stage, prompts["chat"].ids, PAGES, 16, 1)).mean()
    assert alone <= 2 * prompts["chat"].llamacpp_kl, alone


def test_greedy_text_is_the_cpus(graph: Graph, stage: GPUStage) -> None:
    cpu = CPUBackend().open_stage(graph, CONFIG)
    step, position, equal = golden_prompts("smollm2")["chat"].ids[:24], 0, 0
    for _ in range(N_GREEDY):
        batch = make_batch([Piece(step, PAGES, position)], 16, [len(step) - 1])
        expected, found = cpu.run(batch)[0].copy(), stage.run(batch)[0]
        best, ours = int(expected.argmax()), int(found.argmax())
        assert best == ours or expected[best] - expected[ours] < NEARLY_EQUAL
        equal += best == ours
        position, step = position + len(step), [best]
    cpu.close()
    assert equal >= N_GREEDY - 3
