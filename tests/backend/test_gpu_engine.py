"""The engine over an emulated GPU: tokens drawn on the device are those drawn from its logits, alone or behind a CPU stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch, run_prompt
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from fake_cuda import FakeCUDA, fake_cuda
from fake_stage import FakeVocabulary
from rank_sum import EmulatedRank, RankSum
from tiny_models import N_VOCAB

from pyinfer.graph.backend import PageData, Stage, StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.sampling import OverlappingStage, SamplingStage
from pyinfer.graph.split import block_cuts, split_graph
from pyinfer.graph.tensor_split import shard_graph
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.stage_chain import StageChain
from pyinfer.runtime.tensor_stage import open_tensor_stage

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
CONFIG = StageConfig(n_pages=12, n_ctx=64, max_tokens=4, max_sequences=3)
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
    {"repetition_penalty": 1.3, "temperature": 1.2},
    {},
    {"logprobs": 3, "top_p": 0.9},
]

PLAIN = [
    request for request in REQUESTS if not {"repetition_penalty", "logprobs"} & request.keys()
]  # whose steps overlap


class WholeRows:
    """A stage whose logits come back whole: its tokens are the host's."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        return self._stage.run(batch)

    def copy_page(self, source: int, target: int) -> None:
        self._stage.copy_page(source, target)

    def read_pages(self, pages: Sequence[int]) -> PageData:
        return self._stage.read_pages(pages)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        self._stage.write_pages(pages, data)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def graph(tiny_model: Callable[..., Path]) -> Graph:
    return optimize(build_graph(GGUFFile.open(tiny_model("llama", "Q4_0"))))


@pytest.fixture(scope="module")
def gpu(graph: Graph) -> Iterator[GPUStage]:
    stage = GPUStage(EmulatedDevice(), graph, CONFIG)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def mixed(graph: Graph) -> Iterator[StageChain]:
    """The first block on the CPU, the second and the head on the GPU."""
    first, second = split_graph(graph, block_cuts(graph)[1:2])
    chain = StageChain([CPUBackend().open_stage(first, CONFIG), GPUStage(EmulatedDevice(), second, CONFIG)])
    yield chain
    chain.close()


def answers(stage: Stage, multi_step: int = 1, requests: Sequence[dict[str, Any]] = REQUESTS) -> dict[str, Any]:
    engine = Engine(stage, CONFIG, FakeVocabulary(N_VOCAB), multi_step=multi_step)
    for i, params in enumerate(requests):
        prompt = list(range(10 + i, 16 + 2 * i))
        engine.add_request(str(i), prompt, SamplingParams(seed=i, max_tokens=7, ignore_eos=True, **params))
    found: dict[str, Any] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.failure is None
            tokens, logprobs = found.setdefault(output.request_id, ([], []))
            tokens += output.new_token_ids
            for each in output.new_logprobs or ():
                logprobs.append({token: (pytest.approx(e.logprob, abs=1e-5), e.rank) for token, e in each.items()})
        engine.check()
    return found


@pytest.mark.parametrize("multi_step", [1, 4])
def test_tokens_drawn_on_the_device_are_the_hosts(multi_step: int, gpu: GPUStage) -> None:
    assert isinstance(gpu, SamplingStage) and gpu.can_sample
    expected = answers(WholeRows(gpu))
    assert answers(gpu, multi_step) == expected
    assert all(len(tokens) == 7 for tokens, _ in expected.values())


def test_steps_that_are_started_before_the_last_ones_tokens_are_known(gpu: GPUStage) -> None:
    assert isinstance(gpu, OverlappingStage) and gpu.can_overlap
    assert answers(gpu, 1, PLAIN) == answers(WholeRows(gpu), 1, PLAIN)


@pytest.mark.skipif(EmulatedDevice.__module__ != "cuda_emulator.device", reason="the other one is a real card")
def test_on_a_device_that_works_late(graph: Graph, gpu: GPUStage) -> None:
    """CuPy's device: what is asked for happens when the host waits, so nothing may be written over before."""
    with fake_cuda(FakeCUDA()) as module:
        stage = GPUStage(module.CuPyDevice(0), graph, CONFIG)
        try:
            assert answers(stage, 4) == answers(gpu, 4)
            assert answers(stage, 1, PLAIN) == answers(WholeRows(gpu), 1, PLAIN)
        finally:
            stage.close()


def test_behind_a_cpu_stage(mixed: StageChain, graph: Graph) -> None:
    """Logits close to the reference's, tokens as drawn from them."""
    prompt = list(range(20, 45))
    expected = run_prompt(ReferenceBackend().open_stage(graph, CONFIG), prompt, [4, 1], 16, 4)
    logits = run_prompt(mixed, prompt, [4, 1], 16, 4)
    assert np.abs(logits - expected).max() < 4e-2 * np.abs(expected).max()
    assert mixed.can_sample and mixed.max_steps == 1
    assert answers(mixed, 4) == answers(WholeRows(mixed))


@pytest.mark.parametrize("multi_step", [1, 4])
def test_tokens_drawn_by_all_ranks(multi_step: int, tiny_model: Callable[..., Path]) -> None:
    """Only ids come back from a tensor split, several steps at once too."""
    total = RankSum(2)
    backends = [EmulatedRank(EmulatedDevice(all_reduce=total.of(rank))) for rank in range(2)]
    shards = [optimize(shard) for shard in shard_graph(build_graph(GGUFFile.open(tiny_model("llama", "Q4_0"))), 2)]
    stage = open_tensor_stage(backends, shards, CONFIG)
    try:
        assert isinstance(stage, SamplingStage) and stage.can_sample and stage.max_steps > 1
        assert answers(stage, multi_step) == answers(WholeRows(stage))
        assert answers(stage, multi_step, PLAIN) == answers(WholeRows(stage), 1, PLAIN)
    finally:
        stage.close()


def test_pages_move_through_both(mixed: StageChain) -> None:
    prompt = list(range(20, 37))
    expected = run_prompt(mixed, prompt, [0, 1], 16, 4)[-1:]
    mixed.copy_page(0, 7)
    away = mixed.read_pages([7])
    mixed.write_pages([7, 0], np.zeros((2, away.shape[1]), np.uint8))
    mixed.write_pages([9], away)
    last = make_batch([Piece(prompt[-1:], [9, 1], 16)], 16)
    np.testing.assert_array_equal(mixed.run(last), expected)
