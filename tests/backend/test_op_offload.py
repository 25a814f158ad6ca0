"""Half a model on an emulated GPU, which multiplies for the other half in steps of many tokens; and experts on the CPU there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import Piece, make_batch, one_table
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from fake_cuda import FakeCUDA, fake_cuda
from tiny_models import TinyShape

from pyinfer import LLM, SamplingParams
from pyinfer.errors import ConfigError
from pyinfer.graph.backend import Backend, Borrowed, DeviceInfo, LendingBackend, PartStage, Progress, Stage, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import ExpertMatMul
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.sampling import RowSampling
from pyinfer.kernels_cpu.stage import CPUStage
from pyinfer.kernels_gpu.backend import stages_on
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.kernels_gpu.step_buffer import StepBuffer
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime import backends, open_stages, placement
from pyinfer.runtime import offload as offload_module
from pyinfer.runtime.borrow_plan import host_bytes
from pyinfer.runtime.load_options import LoadOptions
from pyinfer.runtime.memory import Memory
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.offload import Offload, OffloadPlan, candidates, make_plan
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
        self.device: Any = EmulatedDevice()

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


def opened(graph: Graph, offload: Offload, min_rows: int = 32, cards: Sequence[DeviceInfo] = (CARD,)) -> Stage:
    plan = make_plan(graph, CONFIG, cards, offload, 1.0)
    return open_stages.open_stages(plan, CONFIG, "cpu", None, min_rows)


def close_to(found: Any, expected: Any, tolerance: float = 4e-2) -> bool:
    return bool(np.abs(found - expected).max() < tolerance * np.abs(expected).max())


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
    blocks = host_bytes(build_graph(GGUFFile.open(path)))
    little = Memory(total=8 * GIB, available=placement.host_need(blocks, Offload(1, op_offload=True)))
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


MIXTURES = {
    "all attention on the GPU": Offload(4, True, True, 4, True, True),
    "a block on the CPU": Offload(3, True, n_cpu_experts=3, op_offload=True, expert_offload=True),
    "three blocks on the CPU": Offload(1, op_offload=True, expert_offload=True),
}


@pytest.mark.parametrize(
    "where, arch, codec",
    [
        ("all attention on the GPU", "qwen2moe", "Q4_0"),
        ("a block on the CPU", "qwen3moe", "F16"),
        ("three blocks on the CPU", "qwen2moe", "Q4_0"),
    ],
)
def test_experts_of_steps_of_many_tokens_go_to_the_gpu(
    where: str, arch: str, codec: str, tiny_model: TinyModel, gpu: EmulatedGPU
) -> None:
    """Prompts and decoding in turn; few tokens are computed as without, bit by bit."""
    graph, offload = graph_of(tiny_model(arch, codec, shape=TinyShape(n_layers=4))), MIXTURES[where]
    reference = ReferenceBackend().open_stage(graph, CONFIG)
    stage, without = opened(graph, offload), opened(graph, replace(offload, expert_offload=False, op_offload=False))
    assert isinstance(stage, OpOffloadStage) and not isinstance(without, OpOffloadStage)
    runs = [number for number, each in enumerate(stage.usual.stages) if isinstance(each, CPUStage)]
    counts = []
    for batch in (
        make_batch([Piece(PROMPT[:40], PAGES)], 16, []),
        make_batch([Piece(PROMPT[40:47], PAGES, 40)], 16, [6]),
        make_batch([Piece(PROMPT[47:80], PAGES, 47), Piece(PROMPT[:4], [7])], 16, [36]),
        make_batch([Piece(PROMPT[80:81], PAGES, 80), Piece(PROMPT[4:5], [7], 4)], 16),
    ):
        right, before = reference.run(batch), gpu.device.launches.get("copy aside", 0)
        found = stage.run(batch).copy()
        assert found.shape == right.shape and (not len(right) or close_to(found, right))
        counts.append(gpu.device.launches.get("copy aside", 0) - before)
    # three blocks' experts go, each in two parts; and the three parts around and between the attention of blocks on the CPU
    more = {"all attention on the GPU": 0, "a block on the CPU": 1, "three blocks on the CPU": 3}[where]
    assert counts == [6 + more + (more > 0), 0, 6 + more + (more > 0), 0]
    assert runs
    few = [make_batch([Piece(PROMPT[i : i + 10], PAGES, i)], 16, [9]) for i in (0, 10, 20)]
    for batch in few:
        np.testing.assert_array_equal(stage.run(batch), without.run(batch))
    stage.close()
    without.close()


@pytest.mark.parametrize("arch, codec", [("qwen3moe", "Q4_0"), ("qwen2moe", "Q8_0")])
def test_experts_that_come_compute_what_those_there_do(
    arch: str, codec: str, tiny_model: TinyModel, gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts on the CPU, against all on the GPU: two prompts in steps with padding, the last block's among them."""
    graph = graph_of(tiny_model(arch, codec, shape=TinyShape(n_layers=4)))
    there, comes = opened(graph, Offload(4, True, True)), opened(graph, MIXTURES["all attention on the GPU"])
    n_uploads, upload = [0], StepBuffer._upload_tables

    def counted(*args: Any) -> None:
        n_uploads[0] += 1
        upload(*args)

    monkeypatch.setattr(StepBuffer, "_upload_tables", counted)
    for batch in (
        make_batch([Piece(PROMPT[:36], PAGES)], 16, []),
        make_batch([Piece(PROMPT[36:50], PAGES, 36), Piece(PROMPT[:19], [7, 2])], 16, []),
        make_batch([Piece(PROMPT[50:76], PAGES, 50), Piece(PROMPT[19:32], [7, 2], 19)], 16, [25, 38]),
    ):
        before, n_uploads[0] = dict(gpu.device.launches), 0
        found = comes.run(batch).copy()
        assert n_uploads == [1], "a step's arrays go to the GPU once for all of its parts"
        tiles = [gpu.device.launches[name] - before.get(name, 0) for name in ("expert_mma", "copy aside")]
        assert tiles == [6, 6], "gate and up, and down, of three blocks"
        right = there.run(batch)
        assert found.shape == right.shape and (not len(right) or close_to(found, right, 5e-3))
    comes.close()
    there.close()


@pytest.mark.parametrize("eager", [False, True])
def test_on_a_gpu_that_works_late(eager: bool, tiny_model: TinyModel, gpu: EmulatedGPU) -> None:
    """CuPy's device: copies happen when they must, or as soon as they may."""
    graph = graph_of(tiny_model("qwen2moe", "Q4_0", shape=TinyShape(n_layers=4)))
    batches = [
        make_batch([Piece(PROMPT[:36], PAGES)], 16, []),
        make_batch([Piece(PROMPT[36:70], PAGES, 36)], 16, [3, 33]),
    ]
    stage = opened(graph, MIXTURES["a block on the CPU"])
    expected = [stage.run(batch).copy() for batch in batches]
    stage.close()
    fake = FakeCUDA()
    fake.is_aside_eager = eager
    with fake_cuda(fake) as module:
        gpu.device = module.CuPyDevice(0)
        stage = opened(graph, MIXTURES["a block on the CPU"])
        for batch, right in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(stage.run(batch), right)
        stage.close()
        assert not fake.registered and not fake.allocated


def test_each_gpu_computes_the_experts_of_its_blocks(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [CARD, replace(CARD, index=1)]
    found = {index: EmulatedGPU() for index in (0, 1)}

    def open_backend(name: str, device: int = 0) -> Backend:
        return found[device] if name == "gpu" else backends.open_backend(name)

    monkeypatch.setattr(open_stages, "open_backend", open_backend)
    graph = graph_of(tiny_model("qwen2moe", "F16", shape=TinyShape(n_layers=5)))
    offload = Offload(4, True, n_cpu_experts=5, op_offload=True, expert_offload=True)
    plan = make_plan(graph, CONFIG, cards, offload, 1.0)
    assert plan.borrowed is not None
    whats = [loan.what for loan in plan.borrowed.loans]
    assert whats == ["products and experts of block 0, experts of blocks 1 to 2", "experts of block 3"]
    stage, reference = opened(graph, offload, cards=cards), ReferenceBackend().open_stage(graph, CONFIG)
    for batch in (
        make_batch([Piece(PROMPT[:40], PAGES)], 16, [39]),
        make_batch([Piece(PROMPT[40:75], PAGES, 40)], 16, [3, 34]),
    ):
        assert close_to(stage.run(batch), reference.run(batch))
    assert [each.device.launches["copy aside"] for each in found.values()] == [2 * (2 + 2 * 3), 2 * 2]
    stage.close()
    assert all(each.device.memory()[0] == each.device.memory()[1] for each in found.values())


def test_the_plan_covers_experts_that_come(tiny_model: TinyModel, gpu: EmulatedGPU) -> None:
    graph = graph_of(tiny_model("qwen3moe", "Q4_0", shape=TinyShape(n_layers=4, n_embd=256, n_experts=16)))
    whole, used = MIXTURES["a block on the CPU"], []
    plans = [
        make_plan(graph, CONFIG, [CARD], each, 1.0)
        for each in (replace(whole, op_offload=False, expert_offload=False), whole)
    ]
    assert plans[1].borrowed is not None
    start = "GPU 0, in steps of many tokens: products and experts of block 0, experts of blocks 1 to 2; weights "
    assert plans[1].lines(12)[-1].startswith(start)
    assert plans[1].borrowed.least_tokens(32) == 64, "32 * 16 experts / 2 a token / 4"
    assert plans[1].borrowed.least_tokens(1) == 2
    experts = sum(w.data.nbytes for op in graph.ops if isinstance(op, ExpertMatMul) for w in op.weights)
    assert 0.75 * experts < plans[1].borrowed.host_bytes < 0.75 * experts + 1e6
    assert plans[1].host_weight_bytes == plans[0].host_weight_bytes + plans[1].borrowed.host_bytes
    for plan in plans:
        stage = open_stages.open_stages(plan, CONFIG, "cpu", None)
        used.append(gpu.device.memory()[1] - gpu.device.memory()[0])
        stage.close()
    of_gpu = [next(stage for stage in plan.stages if stage.device) for plan in plans]
    more = of_gpu[1].n_bytes(12) - of_gpu[0].n_bytes(12)
    assert 0 < used[1] - used[0] < more
    assert used[1] < of_gpu[1].n_bytes(12) - (512 << 20) // 2


def test_steps_of_very_many_outputs_are_the_cpus(
    tiny_model: TinyModel, gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go through the head in turns, and rows that stayed on the GPU cannot be shared out over those."""
    monkeypatch.setattr(open_stages, "OUTPUTS", 4)
    graph = graph_of(tiny_model("llama", "Q8_0", shape=TinyShape(n_layers=3)))
    stage = opened(graph, Offload(1, True, op_offload=True))
    for n, n_copies in ((4, 3), (5, 3)):
        stage.run(make_batch([Piece(PROMPT[:40], PAGES)], 16, list(range(n))))
        assert gpu.device.launches["copy aside"] == n_copies
    stage.close()


def test_experts_are_left_out_where_there_is_no_room(
    tiny_model: TinyModel, gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_model("qwen3moe", "F16", shape=TinyShape(n_layers=3))
    expected, _ = answer(path)
    options = {"n_gpu_layers": "all", "cpu_moe": True}
    tokens, lines = answer(path, **options)
    assert tokens == expected and "experts of blocks 0 to 1; weights" in lines[-1]
    n_copies = gpu.device.launches["copy aside"]
    blocks = host_bytes(build_graph(GGUFFile.open(path)))
    need = placement.host_need(blocks, Offload(3, True, True, 3, True, True))
    assert need > placement.host_need(blocks, Offload(3, True, True, 3, True))
    monkeypatch.setattr(placement, "memory", lambda: Memory(total=8 * GIB, available=need))
    tokens, lines = answer(path, **options)
    assert tokens == expected and "in steps of many tokens" not in lines[-1]
    assert "op_offload leaves out the experts on the CPU: host memory lacks room for it" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(placement, "gpus", lambda: [CARD])

    def open_backend(name: str, device: int = 0) -> Backend:
        return gpu if name == "gpu" else backends.open_backend(name)

    monkeypatch.setattr(open_stages, "open_backend", open_backend)
    whole = offload_module.make_plan

    def without_room(*args: Any) -> OffloadPlan:
        plan = whole(*args)
        more = 8 * GIB if args[3].expert_offload else 0
        return replace(plan, stages=tuple(replace(each, buffer_bytes=each.buffer_bytes + more) for each in plan.stages))

    monkeypatch.setattr(placement, "make_plan", without_room)
    for layers in ("all", "auto"):
        caplog.clear()
        tokens, lines = answer(path, **{**options, "n_gpu_layers": layers})
        assert tokens == expected and "blocks 0 to 2 without experts" in lines[0]
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            "op_offload leaves out the experts on the CPU: the GPU lacks room for it"
        ]
    assert gpu.device.launches["copy aside"] == n_copies
    tokens, lines = answer(path, **options, op_offload=False)
    assert tokens == expected and "in steps of many tokens" not in lines[-1]
