"""Planning from free memory, opening stages by plan, and giving way when a device is smaller than it said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from offload_plans import plan_offload
from rank_sum import RankSum
from tiny_models import TinyShape

from pyinfer import LLM, SamplingParams
from pyinfer.errors import BackendError, ConfigError, DeviceMemoryError
from pyinfer.graph.backend import Backend, DeviceInfo, Progress, Stage, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import MatMul
from pyinfer.graph.reference import ReferenceBackend, ReferenceStage
from pyinfer.kernels_gpu.requirements import NoGPUError
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime import backends, open_stages, placement
from pyinfer.runtime.load_options import LoadOptions
from pyinfer.runtime.model_pieces import divide
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.offload import (
    GPUExpand,
    GPULayers,
    Offload,
    candidates,
    keeps_copies,
    make_plan,
    wanted,
)
from pyinfer.runtime.stage_plan import buffer_bytes, copies_bytes, room, weight_bytes

pytestmark = pytest.mark.unit
N = 6  # blocks
GIB = 1 << 30
CARD = DeviceInfo(0, "H100", 90, free=78 * GIB, total=80 * GIB)
CONFIG = StageConfig(n_pages=32, n_ctx=512, max_tokens=64)


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", "Q4_0", shape=TinyShape(n_layers=N))


@pytest.fixture(scope="module")
def graph(path: Path) -> Graph:
    return build_graph(GGUFFile.open(path))


def with_room(n_bytes: int, index: int = 0) -> DeviceInfo:
    return DeviceInfo(index, "small", 80, free=n_bytes, total=n_bytes)


def names(graph: Graph, devices: list[DeviceInfo], offload: Offload) -> list[tuple[int | None, str]]:
    plan = make_plan(graph, CONFIG, devices, offload, 1.0)
    return [(stage.device.index if stage.device else None, stage.what) for stage in plan.stages]


def test_what_ngl_means() -> None:
    assert wanted(4, N) == Offload(4)
    assert wanted(N, N) == Offload(N)
    assert wanted("all", N) == wanted("auto", N) == wanted(99, N) == Offload(N, True, True)
    assert Offload(N, True, True).n_layers == N + 1
    assert list(candidates(2, N)) == [Offload(2), Offload(1), Offload(0)]
    assert list(candidates(0, N)) == [Offload(0)]
    assert list(candidates("all", 2)) == [Offload(2, True, True), Offload(2, True), Offload(1, True), Offload(0)]


def test_the_last_blocks_go_to_the_gpu(graph: Graph) -> None:
    assert names(graph, [CARD], Offload(0)) == [(None, "all")]
    assert names(graph, [CARD], Offload(N, True, True)) == [(0, "embedding, blocks 0 to 5, head")]
    assert names(graph, [CARD], Offload(1)) == [(None, "embedding, blocks 0 to 4"), (0, "block 5"), (None, "head")]
    assert names(graph, [CARD], Offload(2, True)) == [(None, "embedding, blocks 0 to 3"), (0, "blocks 4 to 5, head")]
    assert names(graph, [CARD], Offload(N)) == [(None, "embedding"), (0, "blocks 0 to 5"), (None, "head")]


def test_several_gpus_share_blocks_by_their_room(graph: Graph) -> None:
    cards = [with_room(2 * GIB, 3), with_room(GIB, 4)]
    assert names(graph, cards, Offload(N, True, True)) == [(3, "embedding, blocks 0 to 3"), (4, "blocks 4 to 5, head")]
    assert names(graph, cards, Offload(3)) == [
        (None, "embedding, blocks 0 to 2"), (3, "blocks 3 to 4"), (4, "block 5"), (None, "head"),
    ]  # fmt: skip
    assert names(graph, cards, Offload(1, True)) == [(None, "embedding, blocks 0 to 4"), (3, "block 5"), (4, "head")]


def test_divide_gives_every_item_to_one_device() -> None:
    assert divide([1] * 32, [24, 24, 24, 24]) == [8, 8, 8, 8]
    assert divide([1] * 32, [80]) == [32]
    assert divide([1] * 10, [30, 0, 70]) == [3, 0, 7]
    assert divide([], [1, 1]) == [0, 0]
    assert divide([5, 1, 1, 1], [50, 50]) == [1, 3]


def test_every_weight_is_counted_where_it_lies(graph: Graph) -> None:
    plan = make_plan(graph, CONFIG, [CARD], Offload(2, True), 1.0)
    cpu, gpu = plan.stages
    assert cpu.weight_bytes + gpu.weight_bytes == pytest.approx(weight_bytes(graph), abs=4)
    assert cpu.page_bytes == 2 * gpu.page_bytes == 4 * 16 * 2 * 2 * 32 * 2 // 2
    assert gpu.buffer_bytes > 64 * 300 * 4  # the logits alone
    assert buffer_bytes(graph, replace(CONFIG, max_tokens=128)) > gpu.buffer_bytes


def test_as_many_blocks_as_fit_with_their_pages(graph: Graph) -> None:
    """A card with room for exactly 3 blocks and the head gets them; with a byte less, or a page more, it gets 2."""
    needed = make_plan(graph, CONFIG, [CARD], Offload(3, True), 1.0).stages[1].n_bytes(CONFIG.n_pages)
    layers: GPULayers
    for layers in ("auto", "all"):
        assert plan_offload(graph, CONFIG, [with_room(needed)], layers, 1.0).offload == Offload(3, True)
        assert plan_offload(graph, CONFIG, [with_room(needed - 1)], layers, 1.0).offload == Offload(2, True)
    more = replace(CONFIG, n_pages=CONFIG.n_pages + 1)
    assert plan_offload(graph, more, [with_room(needed)], "auto", 1.0).offload == Offload(2, True)
    assert plan_offload(graph, CONFIG, [with_room(2 * needed)], "all", 0.5).offload == Offload(3, True)
    assert plan_offload(graph, CONFIG, [with_room(0)], "all", 1.0).offload == Offload(0)
    assert plan_offload(graph, CONFIG, [CARD], "all", 0.9).is_all


def test_what_others_have_taken_is_not_ours() -> None:
    busy = DeviceInfo(0, "busy", 90, free=10 * GIB, total=80 * GIB)
    assert room(busy, 0.9) == int(0.9 * 80 * GIB) - 70 * GIB
    assert room(busy, 0.5) == 0


class FakeGPU:
    """A backend of a device that holds `capacity` blocks; it computes what the reference does."""

    name = "gpu"

    def __init__(self, capacity: int, opened: list[str]) -> None:
        self._capacity, self._opened = capacity, opened

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> Stage:
        if len(graph.kv_layers) > self._capacity:
            raise DeviceMemoryError(f"{len(graph.kv_layers)} blocks and room for {self._capacity}")
        self._opened.append(f"gpu:{len(graph.kv_layers)}")
        return ReferenceBackend().open_stage(graph, config, progress)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes this machine one with these GPUs; returns the list of stages that will be opened on them."""

    def install(*devices: DeviceInfo, capacity: int = 99) -> list[str]:
        opened: list[str] = []

        def open_backend(name: str, device: int = 0) -> Backend:
            return FakeGPU(capacity, opened) if name == "gpu" else backends.open_backend(name)

        monkeypatch.setattr(placement, "gpus", lambda: list(devices))
        monkeypatch.setattr(open_stages, "open_backend", open_backend)
        return opened

    return install


GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def answer(path: Path, **options: object) -> tuple[list[int], list[str]]:
    with LLM(path, kv_cache_dtype="f32", max_num_batched_tokens=32, backend="reference", **options) as llm:
        outputs = llm.generate([list(range(40)), [7, 8, 9]], GREEDY, use_tqdm=False)
        return [token for output in outputs for token in output.outputs[0].token_ids], llm.model.placement


@pytest.mark.parametrize("layers", [1, 4, N, "all", "auto", 99])
def test_tokens_are_the_same_wherever_the_layers_are(
    layers: GPULayers, path: Path, fake: Callable[..., list[str]]
) -> None:
    expected, nothing = answer(path)
    assert nothing == []
    opened = fake(CARD)
    tokens, lines = answer(path, n_gpu_layers=layers)
    assert tokens == expected
    assert opened == [f"gpu:{layers if isinstance(layers, int) and layers <= N else N}"]
    assert any(line.startswith("GPU 0 (H100): ") and "weights" in line and "KV" in line for line in lines)


def test_two_gpus_run_one_model(path: Path, fake: Callable[..., list[str]]) -> None:
    expected, _ = answer(path)
    opened = fake(with_room(40 * GIB, 0), with_room(40 * GIB, 1))
    tokens, lines = answer(path, n_gpu_layers="all")
    assert tokens == expected and opened == ["gpu:3", "gpu:3"]
    assert [line[:5] for line in lines] == ["GPU 0", "GPU 1"]


def test_a_tensor_split_over_two_gpus(
    path: Path, fake: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has a part of every block; where that is not asked of everything, or does not fit, it is not done."""
    expected, _ = answer(path)
    cards = (with_room(40 * GIB, 0), with_room(40 * GIB, 1))
    fake(*cards)
    total = RankSum(2)

    class Rank(FakeGPU):
        def __init__(self, number: int) -> None:
            super().__init__(99, [])
            self._number = number

        def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> Stage:
            return ReferenceStage(graph, config, progress, all_reduce=total.of(self._number))

    monkeypatch.setattr(open_stages, "open_ranks", lambda devices: [Rank(number) for number in devices])
    tokens, lines = answer(path, n_gpu_layers="all", gpu_split="tensor")
    assert tokens == expected and total.n_calls > 0
    assert [line.partition(";")[0] for line in lines] == [
        f"GPU {i} (small): 1/2 of every block and of the head" for i in range(2)
    ]
    with pytest.raises(ConfigError, match="gpu_split"):
        answer(path, n_gpu_layers=2, gpu_split="tensor")
    fake(CARD)
    assert answer(path, n_gpu_layers="all", gpu_split="tensor")[0] == expected  # one GPU has nothing to share


@pytest.mark.parametrize("layers", ["all", 5, "auto"])
def test_a_device_that_is_smaller_than_planned_gets_fewer_layers(
    layers: GPULayers, path: Path, fake: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = answer(path)
    opened = fake(CARD, capacity=3)
    with caplog.at_level(logging.WARNING, "pyinfer"):
        tokens, _ = answer(path, n_gpu_layers=layers)
    assert tokens == expected and opened == ["gpu:3"]
    assert any("did not fit" in message and "room for 3" in message for message in caplog.messages)


def test_what_cannot_fit_is_said_before_loading(
    path: Path, fake: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    opened = fake(with_room(1 << 20))
    expected, _ = answer(path)
    with caplog.at_level(logging.WARNING, "pyinfer"):
        assert answer(path, n_gpu_layers=4) == (expected, [])
    assert opened == []
    assert any("no room for 4 blocks" in message and "CPU" in message for message in caplog.messages)
    caplog.clear()
    assert answer(path, n_gpu_layers="auto") == (expected, [])
    assert not caplog.messages


def test_the_pool_takes_what_the_gpus_have_when_all_is_there(path: Path, fake: Callable[..., list[str]]) -> None:
    graph = build_graph(GGUFFile.open(path))
    fake(with_room(2 * GIB))
    options = LoadOptions(n_gpu_layers="all", max_num_seqs=2)
    sized = placement.size_pool(graph, 0, options, Offload(N, True, True), [with_room(2 * GIB)])
    assert sized is not None and sized.n_pages == 2 * 512 // 16  # no more than can ever be used
    many = replace(options, max_num_seqs=100_000, gpu_memory_utilization=0.5)
    sized = placement.size_pool(graph, 0, many, Offload(N, True, True), [with_room(2 * GIB)])
    assert sized is not None
    plan = make_plan(graph, sized, [with_room(2 * GIB)], Offload(N, True, True), 0.5)
    assert 0 <= GIB - plan.stages[0].n_bytes(sized.n_pages) < plan.page_bytes
    fixed = replace(options, kv_cache_memory=40 * plan.page_bytes)
    sized = placement.size_pool(graph, 0, fixed, Offload(3), [with_room(2 * GIB)])
    assert sized is not None and sized.n_pages == 40


@pytest.mark.parametrize(
    ("offload", "total", "asked", "expected"),
    [
        (Offload(N, True, True), 24 * GIB, None, 2048),
        (Offload(N, True, True), 24 * GIB, 300, 300),
        (Offload(N, True, True), 8 * GIB, None, 512),
        (Offload(N, True), 24 * GIB, None, 512),
        (Offload(N, True, True, n_cpu_experts=1), 24 * GIB, None, 512),
    ],
)
def test_large_gpus_take_larger_steps(
    path: Path, offload: Offload, total: int, asked: int | None, expected: int
) -> None:
    graph = build_graph(GGUFFile.open(path))
    cards = [replace(with_room(GIB), free=size, total=size) for size in (80 * GIB, total)]
    options = LoadOptions(n_gpu_layers="all", max_num_batched_tokens=asked)
    sized = placement.size_pool(graph, 0, options, offload, cards)
    assert sized is not None and sized.max_tokens == expected


def test_float16_copies_are_planned_for(path: Path) -> None:
    graph = build_graph(GGUFFile.open(path))
    everything = Offload(N, True, True)
    copies = copies_bytes(graph)
    assert copies == 2 * sum(op.x.width * out.width for op in graph.ops if isinstance(op, MatMul)
                             for out in op.outs if out.rows == "tokens")  # fmt: skip
    for layers in (everything, Offload(2)):
        large, small = (
            [with_room(GIB)],
            [with_room(make_plan(graph, CONFIG, [CARD], layers, 1.0).stages[-1].n_bytes(40))],
        )
        cases: list[tuple[list[DeviceInfo], GPUExpand, bool]] = [
            (large, "auto", True), (small, "auto", False), (small, "on", True), (large, "off", False),
        ]  # fmt: skip
        for devices, mode, expected in cases:
            assert keeps_copies(graph, CONFIG, devices, layers, 1.0, mode) == expected
    with_copies = make_plan(graph, replace(CONFIG, gpu_expand=True), [CARD], everything, 1.0)
    assert with_copies.stages[0].copy_bytes == copies and "float16 copies" in with_copies.lines(32)[0]
    assert with_copies.max_pages() < make_plan(graph, CONFIG, [CARD], everything, 1.0).max_pages()
    assert not keeps_copies(graph, CONFIG, [], Offload(0), 1.0, "auto")
    for options, kept in (
        (LoadOptions(n_gpu_layers="all", gpu_expand="on"), True),
        (LoadOptions(n_gpu_layers="all", gpu_expand="off"), False),
    ):
        sized = placement.size_pool(graph, 0, options, everything, [with_room(GIB)])
        assert sized is not None and sized.gpu_expand == kept
    with pytest.raises(ConfigError, match="gpu_expand"):
        LoadOptions(gpu_expand="much")  # type: ignore[arg-type]


def test_auto_goes_on_without_a_gpu_and_a_number_does_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(has_device: bool) -> Callable[[], list[DeviceInfo]]:
        def gpus() -> list[DeviceInfo]:
            raise NoGPUError("CuPy is not installed", has_device=has_device)

        return gpus

    monkeypatch.setattr(placement, "gpus", missing(has_device=False))
    with caplog.at_level(logging.WARNING, "pyinfer"):
        answer(path, n_gpu_layers="auto")
    assert not caplog.messages
    monkeypatch.setattr(placement, "gpus", missing(has_device=True))
    answer(path, n_gpu_layers="auto")
    assert any("CuPy is not installed" in message for message in caplog.messages)
    for layers in (1, "all"):
        with pytest.raises(BackendError, match="CuPy is not installed"):
            answer(path, n_gpu_layers=layers)


@pytest.mark.parametrize("layers", [-1, "some", 1.5, True, None])
def test_wrong_numbers_of_layers(layers: object) -> None:
    with pytest.raises(ConfigError, match="n_gpu_layers"):
        LoadOptions(n_gpu_layers=layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_wrong_utilization(share: float) -> None:
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        LoadOptions(gpu_memory_utilization=share)
