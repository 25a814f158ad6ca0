"""Experts on the CPU, the rest of their blocks on GPUs: what is planned, what it costs where, and equal tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from offload_plans import plan_offload
from tiny_models import TinyShape

from pyinfer import LLM, SamplingParams
from pyinfer.errors import ConfigError
from pyinfer.graph.backend import Backend, DeviceInfo, Progress, Stage, StageConfig
from pyinfer.graph.experts import gather_experts
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, CombineExperts, ExpertMatMul, MatMul, RouteExperts
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime import backends, open_stages, placement
from pyinfer.runtime.load_options import LoadOptions
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.offload import Offload, candidates, make_plan, wanted
from pyinfer.runtime.stage_plan import weight_bytes

pytestmark = pytest.mark.unit
N = 4  # blocks
GIB = 1 << 30
CARD = DeviceInfo(0, "card", 90, free=80 * GIB, total=80 * GIB)
CONFIG = StageConfig(n_pages=32, n_ctx=512, max_tokens=64)
ARCHITECTURES = ("qwen3moe", "qwen2moe")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def path(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(request.param, "Q8_0", shape=TinyShape(n_layers=N))


@pytest.fixture(scope="module")
def graph(path: Path) -> Graph:
    return optimize(build_graph(GGUFFile.open(path)))


def opened(monkeypatch: pytest.MonkeyPatch, *devices: DeviceInfo) -> list[Graph]:
    """Makes this machine one with these GPUs; returns the list of what will be opened on them."""
    graphs: list[Graph] = []

    class GPU:
        name = "gpu"

        def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> Stage:
            graphs.append(graph)
            return ReferenceBackend().open_stage(graph, config, progress)

    def open_backend(name: str, device: int = 0) -> Backend:
        return GPU() if name == "gpu" else backends.open_backend(name)

    monkeypatch.setattr(placement, "gpus", lambda: list(devices))
    monkeypatch.setattr(open_stages, "open_backend", open_backend)
    return graphs


def answer(path: Path, **options: object) -> tuple[list[int], list[str]]:
    with LLM(path, kv_cache_dtype="f32", max_num_batched_tokens=32, backend="reference", **options) as llm:
        outputs = llm.generate([list(range(40)), [7, 8, 9]], GREEDY, use_tqdm=False)
        return [token for output in outputs for token in output.outputs[0].token_ids], llm.model.placement


def has_experts(graph: Graph) -> bool:
    return any(isinstance(op, ExpertMatMul) for op in graph.ops)


def test_experts_are_gathered_without_router_and_shared_expert(graph: Graph) -> None:
    gathered, runs = gather_experts(graph)
    assert [run.block for run in runs] == list(range(N))
    assert sorted(map(id, gathered.ops)) == sorted(map(id, graph.ops))
    gathered.check()
    for run in runs:
        ops = gathered.ops[run.start : run.end]
        assert isinstance(ops[0], ExpertMatMul) and isinstance(ops[-1], CombineExperts)
        assert not any(isinstance(op, MatMul | RouteExperts | Attention) for op in ops)
    assert sum(has_experts(replace(graph, ops=gathered.ops[run.start : run.end])) for run in runs) == N


def test_experts_are_gathered_from_among_other_ops(graph: Graph) -> None:
    """Where something else stands between the products, it comes before them."""
    gathered, runs = gather_experts(graph)
    run, ops = runs[1], list(gathered.ops)
    first = ops.pop(run.start)
    router = max(i for i in range(run.start) if isinstance(ops[i], RouteExperts))
    scattered = replace(graph, ops=(*ops[: router + 1], first, *ops[router + 1 :]))
    again, found = gather_experts(scattered)
    assert found == runs and list(map(id, again.ops)) == list(map(id, gathered.ops))


def test_what_the_options_mean(path: Path, graph: Graph) -> None:
    built = build_graph(GGUFFile.open(path))
    for options, expected in (
        (LoadOptions(), 0),
        (LoadOptions(cpu_moe=True), N),
        (LoadOptions(n_cpu_moe=3), 3),
        (LoadOptions(n_cpu_moe=99), N),
        (LoadOptions(cpu_moe=True, n_cpu_moe=1), N),
    ):
        assert placement.cpu_experts(built, options) == expected
    assert wanted("all", N, 2) == Offload(N, True, True, 2)
    assert list(candidates(2, N, 3)) == [Offload(2, n_cpu_experts=3), Offload(1, n_cpu_experts=3), Offload(0)]
    with pytest.raises(ConfigError, match="n_cpu_moe"):
        LoadOptions(n_cpu_moe=-1)


@pytest.mark.parametrize(
    "offload, expected",
    [
        (
            Offload(N, True, True, N),
            ["GPU embedding, blocks 0 to 3 without experts, head", "CPU experts of blocks 0 to 3"],
        ),
        (
            Offload(N, True, True, 1),
            ["GPU embedding, blocks 0 to 3 without the experts of 0, head", "CPU experts of block 0"],
        ),
        (
            Offload(3, True, False, 3),
            [
                "CPU embedding, block 0",
                "GPU blocks 1 to 3 without the experts of 1 to 2, head",
                "CPU experts of blocks 1 to 2",
            ],
        ),
        (
            Offload(1, n_cpu_experts=N),
            ["CPU embedding, blocks 0 to 2", "GPU block 3 without experts", "CPU experts of block 3", "CPU head"],
        ),
        (Offload(2, n_cpu_experts=2), ["CPU embedding, blocks 0 to 1", "GPU blocks 2 to 3", "CPU head"]),
    ],
)
def test_the_plan_says_where_experts_are(offload: Offload, expected: list[str], graph: Graph) -> None:
    plan = make_plan(graph, CONFIG, [CARD], offload, 1.0)
    assert [f"{'CPU' if stage.device is None else 'GPU'} {stage.what}" for stage in plan.stages] == expected
    lines = plan.lines(CONFIG.n_pages)
    assert all("weights" in line for line in lines)
    assert sum("KV" in line for line in lines) == 1 + (offload.n_blocks < N)
    for part, device in plan.parts:
        assert not has_experts(part) or device is None or offload.n_cpu_experts < N
    assert sum(stage.weight_bytes for stage in plan.stages) == pytest.approx(weight_bytes(graph), abs=4)
    whole = make_plan(graph, CONFIG, [CARD], Offload(0), 1.0)
    assert plan.page_bytes == whole.page_bytes


def test_more_blocks_fit_without_their_experts(graph: Graph) -> None:
    """Only if it was asked for: a card too small for all blocks holds all of them without their experts."""
    needed = make_plan(graph, CONFIG, [CARD], Offload(N, True, True, N), 1.0).stages[0].n_bytes(CONFIG.n_pages)
    card = replace(CARD, free=needed, total=needed)
    assert plan_offload(graph, CONFIG, [card], "auto", 1.0).offload.n_blocks < N
    plan = plan_offload(graph, CONFIG, [card], "auto", 1.0, N)
    assert plan.offload == Offload(N, True, True, N) and plan.is_all
    less = replace(card, free=needed - 1, total=needed - 1)
    assert plan_offload(graph, CONFIG, [less], "auto", 1.0, N).offload == Offload(N, True, False, N)


def test_blocks_of_several_gpus_are_shared_out_without_experts(graph: Graph) -> None:
    cards = [replace(CARD, index=i) for i in range(2)]
    plan = make_plan(graph, CONFIG, cards, Offload(N, True, True, N), 1.0)
    assert [stage.what for stage in plan.stages if stage.device is not None] == [
        "embedding, blocks 0 to 1 without experts",
        "blocks 2 to 3 without experts, head",
    ]
    devices = [None if device is None else device.index for _, device in plan.parts]
    assert devices.count(None) == N and devices[0] == 0 and devices[-1] == 1
    assert [device for device in devices if device is not None] == sorted(d for d in devices if d is not None)


@pytest.mark.parametrize("options", [{"cpu_moe": True}, {"n_cpu_moe": 2}, {"cpu_moe": True, "n_gpu_layers": 2}])
def test_tokens_are_the_same_wherever_experts_are(
    options: dict[str, object], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = answer(path)
    graphs = opened(monkeypatch, CARD)
    tokens, lines = answer(path, **{"n_gpu_layers": "all", **options})
    assert tokens == expected
    assert sum(map(has_experts, graphs)) == (1 if "n_cpu_moe" in options else 0)
    assert any("experts of block" in line and line.startswith("CPU") for line in lines)


@pytest.mark.parametrize("layers", [0, "auto"])
def test_without_a_gpu_one_line_says_that_nothing_changes(
    layers: object, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = answer(path)
    opened(monkeypatch)
    with caplog.at_level(logging.WARNING, "pyinfer"):
        assert answer(path, n_gpu_layers=layers, cpu_moe=True) == (expected, [])
    (message,) = caplog.messages
    assert "nothing runs on a GPU" in message


def test_a_model_without_experts(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened(monkeypatch, CARD)
    with caplog.at_level(logging.WARNING, "pyinfer"):
        answer(tiny_model("llama", "Q8_0"), n_gpu_layers="all", n_cpu_moe=2)
    (message,) = caplog.messages
    assert "no experts" in message
