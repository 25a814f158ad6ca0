"""Whole tiny models on `GPUStage` with the emulated device: logits against the reference interpreter, in every kind of step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch, run_prompt
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from tiny_models import TinyShape

from pyinfer.errors import ConfigError, DeviceMemoryError
from pyinfer.graph import reference
from pyinfer.graph.activation import quantize_activation
from pyinfer.graph.backend import StageConfig, kv_page_bytes
from pyinfer.graph.batch import Batch
from pyinfer.graph.graph import Graph
from pyinfer.graph.kv_groups import group_layers
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceStage
from pyinfer.graph.split import block_cuts, split_graph
from pyinfer.kernels_gpu import stage as stage_module
from pyinfer.kernels_gpu.buckets import DECODE_ROWS
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="there is no g++")]

F32 = npt.NDArray[np.float32]
TinyModel = Callable[..., Path]
CONFIG = StageConfig(n_pages=48, block_size=16, max_tokens=64, max_sequences=12, n_ctx=160)
IDS: list[int] = np.random.RandomState(5).randint(0, 300, 200).tolist()
HALF = 2e-3  # float16 weights and rows: each is off by up to 5e-4


class HalfRows:
    """What rows are to a matmul of many rows: float16 under a power of two for each row (`kernels_gpu.operand`)."""

    def __init__(self, x: F32) -> None:
        largest = np.abs(x).max(axis=1, keepdims=True, initial=0)
        self._scale = np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, 1))) - 15).astype(np.float32)
        self._data = (x / self._scale).astype(np.float16)

    def dequantize(self) -> F32:
        return self._data.astype(np.float32) * self._scale


@pytest.fixture
def forms_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference rounds what matmuls read as the GPU does: int8 blocks for few rows, float16 for many."""
    monkeypatch.setattr(
        reference, "quantize_activation", lambda x: quantize_activation(x) if len(x) <= DECODE_ROWS else HalfRows(x)
    )


def mixed(name: str) -> str:
    """A file with every kind of neighbour: float beside quantized, K beside legacy types."""
    kinds = {"token_embd": "Q6_K", "attn_v": "Q6_K", "attn_q": "F16", "ffn_down": "Q5_1", "ffn_up": "Q8_0"}
    return next((kind for part, kind in kinds.items() if part in name), "Q4_K")


@lru_cache(maxsize=16)
def graph_of(path: Path) -> Graph:
    graph = build_graph(GGUFFile.open(path))
    return optimize(replace(graph, kv_groups=group_layers(graph.kv_layers)))


@pytest.fixture
def opened() -> Iterator[Callable[..., GPUStage]]:
    stages: list[GPUStage] = []

    def open_stage(graph: Graph, device: EmulatedDevice | None = None, **sizes: Any) -> GPUStage:
        stages.append(GPUStage(device or EmulatedDevice(), graph, replace(CONFIG, **sizes)))
        return stages[-1]

    yield open_stage
    for stage in stages:
        stage.close()


def pages(sequence: int, graph: Graph, size: int = 10) -> list[list[int]]:
    """Pages of a sequence in each KV group, in no order; those of three sequences in two groups fit."""
    n = len(graph.kv_groups)
    order = np.random.RandomState(7).permutation(CONFIG.n_pages)
    return (
        [order[(sequence * n + g) * size :][:size].tolist() for g in range(n)]
        if n == 1
        else [order[(sequence * n + g) * 8 :][:8].tolist() for g in range(n)]
    )


def steps(graph: Graph, block_size: int = 16) -> Iterator[Batch]:
    """A prompt; a second beside a token; two tokens; two of one sequence; a third prompt beside two tokens; its next piece.

    Of few different sizes, as each has kernels to be compiled.
    """
    done = [0, 0, 0]

    def piece(sequence: int, n: int) -> Piece:
        start = done[sequence]
        done[sequence] += n
        return Piece(IDS[40 * sequence + start :][:n], pages(sequence, graph), start)

    plan: Sequence[Sequence[tuple[int, int]]] = (
        [(0, 20)], [(0, 1), (1, 19)], [(0, 1), (1, 1)], [(0, 2)], [(1, 1), (2, 20), (0, 1)], [(2, 20)], [(0, 1)],
    )  # fmt: skip
    for index, sequences in enumerate(plan):
        taken = [piece(*part) for part in sequences]
        n = sum(len(p.ids) for p in taken)
        outputs = None if index % 2 else [n - 1]
        yield make_batch(taken, block_size, outputs)


def errors(logits: F32, expected: F32) -> F32:
    """Of each row, relative to the largest logit."""
    assert logits.shape == expected.shape and np.isfinite(logits).all()
    return np.abs(logits - expected).max(axis=1) / np.abs(expected).max()


MODELS = [("llama", mixed), ("qwen2", "Q8_0"), ("qwen3", "BF16"), ("gemma3", "Q4_0"), ("llama", "F32")]


@pytest.mark.usefixtures("forms_of_the_gpu")
@pytest.mark.parametrize("arch, kind", MODELS, ids=lambda value: value if isinstance(value, str) else "mixed")
def test_every_kind_of_step_equals_the_reference(
    arch: str, kind: Any, tiny_model: TinyModel, opened: Callable[..., GPUStage]
) -> None:
    """Rows are as close as rounding lets them be: a code or a float16 between two values may fall either way."""
    graph = graph_of(tiny_model(arch, kind))
    assert len(graph.kv_groups) == (2 if arch == "gemma3" else 1)
    stage, expected = opened(graph), ReferenceStage(graph, CONFIG)
    found = []
    for batch in steps(graph):
        found.append(errors(stage.run(batch), expected.run(batch)))
        assert found[-1].max() < 4e-2, f"step {len(found)}"
    assert np.median(np.concatenate(found)) < HALF


@pytest.mark.parametrize("kv_dtype, block_size", [("f32", 1), ("bf16", 8), ("q8_0", 64), ("q8_0,f16", 16)])
def test_page_types_and_sizes(
    kv_dtype: str, block_size: int, tiny_model: TinyModel, opened: Callable[..., GPUStage]
) -> None:
    graph = graph_of(tiny_model("llama", "F32", shape=TinyShape(head_dim=32)))
    sizes: dict[str, Any] = {
        "kv_dtype": kv_dtype,
        "block_size": block_size,
        "n_pages": 80,
        "n_ctx": 160 if block_size > 1 else 80,
    }
    stage, expected = opened(graph, **sizes), ReferenceStage(graph, replace(CONFIG, **sizes))
    table = np.random.RandomState(3).permutation(80)[: sizes["n_ctx"] // block_size].tolist()
    for start, n in ((0, 20), (20, 1), (21, 20), (41, 2)):
        batch = make_batch([Piece(IDS[start : start + n], table, start)], block_size)
        assert errors(stage.run(batch), expected.run(batch)).max() < (5e-6 if kv_dtype == "f32" else HALF)


def test_order_of_threads_does_not_matter(tiny_model: TinyModel, opened: Callable[..., GPUStage]) -> None:
    """What is not synchronized would show: blocks and threads run backwards in the second stage."""
    graph = graph_of(tiny_model("gemma3", "Q4_0"))
    forwards, backwards = opened(graph), opened(graph, EmulatedDevice(descending=True))
    for batch in steps(graph):
        assert (forwards.run(batch) == backwards.run(batch)).all()


def test_parts_compute_what_the_whole_does(tiny_model: TinyModel, opened: Callable[..., GPUStage]) -> None:
    graph = graph_of(tiny_model("qwen2", "Q8_0"))
    whole = opened(graph)
    parts = [opened(part) for part in split_graph(graph, block_cuts(graph)[1:])]
    assert len(parts) == 3
    for batch in steps(graph):
        rows = batch
        for part in parts:
            result = part.run(rows).copy()
            rows = replace(batch, hidden=(result,))
        assert (result == whole.run(batch)).all()


@pytest.mark.usefixtures("forms_of_the_gpu")
def test_more_outputs_than_a_program_has(
    tiny_model: TinyModel, opened: Callable[..., GPUStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "_MAX_OUTPUTS", 24)
    graph = graph_of(tiny_model("qwen2", "Q8_0"))
    stage, expected = opened(graph), ReferenceStage(graph, CONFIG)
    batch = make_batch([Piece(IDS[:28], pages(0, graph)), Piece(IDS[40:60], pages(1, graph))], 16)
    assert errors(stage.run(batch), expected.run(batch)).max() < HALF


def test_a_step_without_outputs(tiny_model: TinyModel, opened: Callable[..., GPUStage]) -> None:
    graph = graph_of(tiny_model("qwen2", "Q8_0"))
    stage, other = opened(graph), opened(graph)
    table = pages(0, graph)
    assert stage.run(make_batch([Piece(IDS[:24], table)], 16, [])).shape == (0, 300)
    other.run(make_batch([Piece(IDS[:24], table)], 16))
    batch = make_batch([Piece(IDS[24:25], table, 24)], 16)
    assert (stage.run(batch) == other.run(batch)).all()


@pytest.mark.parametrize("staging", [1, 32 << 20], ids=["one at a time", "together"])
def test_pages_are_copied_read_and_written(
    staging: int, tiny_model: TinyModel, opened: Callable[..., GPUStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyinfer.kernels_gpu.pages._STAGING", staging)
    graph = graph_of(tiny_model("qwen2", "Q8_0"))
    stage = opened(graph, kv_dtype="f16,f32")
    first, second, third = [4, 2], [9, 11], [30, 1]
    run_prompt(stage, IDS[:20], first, 16)
    for source, target in zip(first, second, strict=True):
        stage.copy_page(source, target)
    data = stage.read_pages(first)
    assert data.shape == (2, kv_page_bytes(graph, 16, "f16,f32"))
    stage.write_pages(third, data)
    results = [
        stage.run(make_batch([Piece(IDS[20:21], table, 20)], 16)).copy() for table in (first, second, third, [3, 40])
    ]
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()
    assert not (results[0] == results[3]).all()
    assert (stage.read_pages(third) == stage.read_pages(second)).all()


def test_steps_do_not_allocate(tiny_model: TinyModel, opened: Callable[..., GPUStage]) -> None:
    graph, device = graph_of(tiny_model("qwen2", "Q8_0")), EmulatedDevice()
    stage = opened(graph, device)
    free = device.memory()
    for batch in steps(graph):
        stage.run(batch)
    assert device.memory() == free


def test_launches_of_a_decode_step(tiny_model: TinyModel, opened: Callable[..., GPUStage]) -> None:
    """Rope, head norms and storing are part of attention, sums part of products and norms, the activation of its products."""
    for arch, kind, a_layer in (("qwen2", "Q8_0", 7), ("qwen3", "BF16", 7), ("gemma3", "Q4_0", 7)):
        graph, device = graph_of(tiny_model(arch, kind)), EmulatedDevice()
        stage = opened(graph, device)
        device.launches.clear()
        stage.run(make_batch([Piece(IDS[:1], pages(0, graph))], 16))
        n_ropes = len({id(op.rope) for op in graph.ops if hasattr(op, "rope")})
        counts = dict(device.launches)
        assert counts.pop("embed") == 1 and counts.pop("rope_angles") == n_ropes
        assert counts.pop("attention_decode") == 2 and counts.pop("gemv_gated") == 2 and counts.pop("gemv") == 7
        assert sum(counts.values()) <= 2 * a_layer + 2 - 2 - 2 - 7 + 2, counts


def test_what_cannot_be_run_is_said(tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model("qwen2", "Q8_0"))
    for sizes, message in (
        ({"block_size": 65}, "block size 65 is not 1 to 64"),
        ({"kv_dtype": "q8_0"}, "needs heads of a multiple of 32 columns; this model has 16"),
        ({"max_tokens": 70000}, "max_num_batched_tokens is 70000; a step on a GPU has at most 65535 tokens"),
    ):
        device = EmulatedDevice()
        with pytest.raises(ConfigError, match=message):
            GPUStage(device, graph, replace(CONFIG, **sizes))
        assert device.memory() == (device.memory()[1],) * 2, "memory of a stage that did not open"
    with pytest.raises(DeviceMemoryError):
        GPUStage(EmulatedDevice(n_bytes=200_000), graph, CONFIG)
