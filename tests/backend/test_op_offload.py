"""Half a model on an emulated GPU, which multiplies for the other half in steps of many tokens; and experts on the CPU there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import Piece, make_batch, one_table
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from tiny_models import TinyShape

from pyinfer import LLM, SamplingParams
from pyinfer.errors import ConfigError
from pyinfer.graph.backend import Backend, Borrowed, DeviceInfo, LendingBackend, PartStage, Progress, Stage, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.sampling import RowSampling
from pyinfer.kernels_gpu.backend import stages_on
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime import backends, open_stages, placement
from pyinfer.runtime.borrow_plan import host_bytes
from pyinfer.runtime.load_options import LoadOptions
from pyinfer.runtime.memory import Memory
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.offload import Offload, candidates, make_plan
from pyinfer.runtime.op_offload import OpOffloadStage

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
TinyModel = Callable[..., Path]
GIB = 1 << 30
CARD = DeviceInfo(0, "card", 90, free=8 * GIB, total=8 * GIB)
CONFIG = StageConfig(n_pages=12, n_ctx=128, max_tokens=40, max_sequences=3, n_threads=2)
PROMPT: list[int] = np.random.RandomState(5).randint(0, 300, 90).tolist()
PAGES = [3, 0, 6, 5, 1, 8]


class EmulatedGPU:
    """See `graph.backend.LendingBackend`."""

    name = "gpu"

    def __init__(self) -> None:
        self.device = EmulatedDevice()

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> Stage:
        return GPUStage(self.device, graph, config, progress)

    def open_stages(
        self,
        graphs: Sequence[Graph],
        config: StageConfig,
        progress: Progress | None = None,
        last_readers: Sequence[int] = (),
    ) -> list[PartStage]:
        return list(stages_on(self.device, graphs, config, progress, last_readers))

    def open_lending_stages(
        self,
        graphs: Sequence[Graph],
        borrowed: Borrowed,
        config: StageConfig,
        progress: Progress | None = None,
        last_readers: Sequence[int] = (),
    ) -> list[PartStage]:
        return list(stages_on(self.device, graphs, config, progress, last_readers, borrowed))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> EmulatedGPU:
    """The only one of this machine."""
    found = EmulatedGPU()
    assert isinstance(found, LendingBackend)

    def open_backend(name: str, device: int = 0) -> Backend:
        return found if name == "gpu" else backends.open_backend(name)

    monkeypatch.setattr(placement, "gpus", lambda: [CARD])
    monkeypatch.setattr(open_stages, "open_backend", open_backend)
    return found


def graph_of(path: Path) -> Graph:
    return one_table(optimize(build_graph(GGUFFile.open(path))))


def opened(graph: Graph, offload: Offload, min_rows: int = 32) -> Stage:
    plan = make_plan(graph, CONFIG, [CARD], offload, 1.0)
    return open_stages.open_stages(plan, CONFIG, "cpu", None, min_rows)


def close_to(found: Any, expected: Any) -> bool:
    return bool(np.abs(found - expected).max() < 4e-2 * np.abs(expected).max())


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("offload", [Offload(1, True, op_offload=True), Offload(1, op_offload=True)])
def test_steps_of_many_tokens_go_to_the_gpu(
    arch: str, offload: Offload, tiny_model: TinyModel, gpu: EmulatedGPU
) -> None:
    """Prompts and decoding in turn, over the same pages, a second sequence beside; few tokens stay, bit by bit."""
    graph = graph_of(tiny_model(arch, "Q4_0", shape=TinyShape(n_layers=3)))
    batches = [
        make_batch([Piece(PROMPT[:40], PAGES)], 16, [0, 39]),
        make_batch([Piece(PROMPT[40:47], PAGES, 40)], 16, [6]),
        make_batch([Piece(PROMPT[47:83], PAGES, 47), Piece(PROMPT[:4], [7])], 16, [35, 39]),
        make_batch([Piece(PROMPT[83:84], PAGES, 83), Piece(PROMPT[4:5], [7], 4)], 16),
        make_batch([Piece(PROMPT[84:85], PAGES, 84)], 16, []),
    ]
    expected = ReferenceBackend().open_stage(graph, CONFIG)
    stage = opened(graph, offload)
    assert isinstance(stage, OpOffloadStage) and stage.can_sample == offload.has_head
    n_copies = []
    for batch in batches:
        right, found = expected.run(batch), stage.run(batch)
        assert found.shape == right.shape and (not len(right) or close_to(found, right))
        n_copies.append(gpu.device.launches.get("copy aside", 0))
    assert n_copies == [3, 3, 6, 6, 6]  # a part before, between and behind the attention of each of two blocks
    if stage.can_sample:
        rows = [RowSampling(row=0), RowSampling(row=1)]
        assert stage.run_sampled(batches[0], rows, None).tokens == stage.run(batches[0]).argmax(axis=1).tolist()
    stage.close()
    assert gpu.device.memory()[0] == gpu.device.memory()[1]


def test_few_tokens_are_as_without(tiny_model: TinyModel, gpu: EmulatedGPU) -> None:
    graph = graph_of(tiny_model("qwen2", "Q8_0", shape=TinyShape(n_layers=3)))
    found = []
    for op_offload in (True, False):
        stage = opened(graph, Offload(1, True, op_offload=op_offload))
        assert isinstance(stage, OpOffloadStage) == op_offload
        steps = [make_batch([Piece(PROMPT[i : i + 20], PAGES, i)], 16, [19]) for i in range(0, 60, 20)]
        found.append([stage.run(batch).copy() for batch in steps])
        away = stage.read_pages([3, 0])
        stage.write_pages([9, 2], away)
        moved = [9, 2, *PAGES[2:]]
        found[-1].append(stage.run(make_batch([Piece(PROMPT[60:61], moved, 60)], 16)).copy())
        stage.copy_page(6, 4)
        found[-1].append(stage.run(make_batch([Piece(PROMPT[60:61], [9, 2, 4, 5], 60)], 16)).copy())
        stage.close()
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_plan_says_what_goes_and_covers_it(tiny_model: TinyModel, gpu: EmulatedGPU) -> None:
    graph = graph_of(tiny_model("llama", "Q4_0", shape=TinyShape(n_layers=4)))
    with_it, without = (
        make_plan(graph, CONFIG, [CARD], Offload(2, True, op_offload=flag), 1.0) for flag in (True, False)
    )
    assert with_it.borrowed is not None and without.borrowed is None
    line = with_it.lines(12)[-1]
    assert line.startswith("GPU 0, in steps of many tokens: products of blocks 0 to 1; weights ")
    more = with_it.stages[1].n_bytes(12) - without.stages[1].n_bytes(12)
    assert more > 0 and with_it.host_weight_bytes > without.host_weight_bytes
    used = []
    for offload in (Offload(2, True), Offload(2, True, op_offload=True)):
        stage = opened(graph, offload)
        used.append(gpu.device.memory()[1] - gpu.device.memory()[0])
        stage.close()
    assert 0 < used[1] - used[0] < 1.5 * more  # rows of 64 columns are padded to 256
    fixed = 512 << 20
    assert used[1] < with_it.stages[1].n_bytes(12) - fixed // 2
    for nothing in (Offload(4, True, True, op_offload=True), Offload(0), Offload(4, op_offload=True)):
        assert make_plan(graph, CONFIG, [CARD], nothing, 1.0).borrowed is None
    tried = [(each.n_blocks, each.op_offload) for each in candidates(2, 4, op_offload=True)]
    assert tried == [
        (2, True),
        (2, False),
        (1, True),
        (1, False),
        (0, False),
    ]  # the number that was asked for comes first
    assert all(each.op_offload for each in candidates("auto", 4, op_offload=True) if each.n_layers)
    with pytest.raises(ConfigError, match="op_offload_min_batch"):
        LoadOptions(op_offload_min_batch=0)


GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def answer(path: Path, **options: Any) -> tuple[list[list[int]], list[str]]:
    small = {"max_num_batched_tokens": 40, "max_num_seqs": 3, "kv_cache_memory": 1 << 20, "n_threads": 2, "n_ctx": 128}
    with LLM(path, **{**small, **options}) as llm:
        outputs = llm.generate([PROMPT[:50], PROMPT[:9]], GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs], llm.model.placement


def test_the_same_text(tiny_model: TinyModel, gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model("llama", "Q8_0", shape=TinyShape(n_layers=3))
    expected, nothing = answer(path)
    assert nothing == []
    assert answer(path, n_gpu_layers=1, op_offload=False)[0] == expected
    assert "copy aside" not in gpu.device.launches
    tokens, lines = answer(path, n_gpu_layers=1)
    assert tokens == expected and gpu.device.launches["copy aside"] > 0
    assert "products of blocks 0 to 1" in lines[-1]
    before = gpu.device.launches["copy aside"]
    little = Memory(total=8 * GIB, available=sum(host_bytes(build_graph(GGUFFile.open(path)))[:2]))
    monkeypatch.setattr(placement, "memory", lambda: little)
    tokens, lines = answer(path, n_gpu_layers=1)  # the host lacks room for weights that are there twice
    assert tokens == expected and gpu.device.launches["copy aside"] == before and "products" not in lines[-1]
    tokens, lines = answer(path, n_gpu_layers=1, op_offload_min_batch=41)  # more than a step may have
    assert tokens == expected and gpu.device.launches["copy aside"] == before and "products" not in lines[-1]


@pytest.mark.parametrize("arch", ["qwen3moe", "qwen2moe"])
@pytest.mark.parametrize("codec", ["Q4_0", "F16"])
def test_experts_on_the_cpu(arch: str, codec: str, tiny_model: TinyModel, gpu: EmulatedGPU) -> None:
    """Attention, router and shared expert on the GPU, experts on the CPU, for prompts and decoding; then all on the CPU."""
    graph = graph_of(tiny_model(arch, codec, shape=TinyShape(n_layers=3)))
    batches = [
        make_batch([Piece(PROMPT[:40], PAGES)], 16, [0, 39]),
        make_batch([Piece(PROMPT[40:45], PAGES, 40), Piece(PROMPT[:4], [7])], 16, []),
        make_batch([Piece(PROMPT[45:46], PAGES, 45), Piece(PROMPT[4:5], [7], 4)], 16),
    ]
    reference = ReferenceBackend().open_stage(graph, CONFIG)
    expected = [reference.run(batch) for batch in batches]
    for offload in (Offload(3, True, True, 3), Offload(2, True, n_cpu_experts=2, op_offload=True)):
        stage = opened(graph, offload)
        for batch, right in zip(batches, expected, strict=True):
            found = stage.run(batch)
            assert found.shape == right.shape and (not len(right) or close_to(found, right))
        stage.close()
        assert gpu.device.memory()[0] == gpu.device.memory()[1]
