"""Blocks of the CPU whose products, experts too, a GPU computes, with matrices that come through its memory part by part."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch, one_table
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from fake_cuda import FakeCUDA, fake_cuda
from tiny_models import TinyShape

from pyinfer.graph.backend import Borrowed, HostStage, PartStage, PinningStage, StageConfig
from pyinfer.graph.borrow import borrow_products
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import ApplyRope, Attention, Embed, ExpertMatMul, Hidden, MatMul, StoreKV
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.split import block_cuts, last_readers, sources, split_graph
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_gpu import stage as stage_module
from pyinfer.kernels_gpu.backend import stages_on
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.side_copies import page_spans
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.stage_chain import StageChain

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
TinyModel = Callable[..., Path]
SHAPE = TinyShape(n_layers=3)
PROMPT: list[int] = np.random.RandomState(5).randint(0, 300, 50).tolist()
PAGES = [3, 0, 6, 5]
CONFIG = StageConfig(n_pages=8, n_ctx=128, max_tokens=24, max_sequences=4, n_threads=2)


def graph_of(path: Path) -> Graph:
    return one_table(optimize(build_graph(GGUFFile.open(path))))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3", "qwen2moe"])
def test_products_go_and_attention_stays(arch: str, experts: bool, tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model(arch, "Q4_0", shape=SHAPE))
    parts, flags = borrow_products(graph, experts=experts)
    assert flags[0] is False and flags[-1] is True
    for part, goes in zip(parts, flags, strict=True):
        kinds = {type(op) for op in part.ops} - {Hidden}
        n_experts = sum(isinstance(op, ExpertMatMul) for op in part.ops)
        if goes:
            assert kinds & {MatMul, ExpertMatMul} and not kinds & {Embed, ApplyRope, StoreKV, Attention}
            assert n_experts <= experts
        else:
            assert MatMul not in kinds and part.kv_layers == graph.kv_layers and not (experts and n_experts)
    assert sum(flags) == (4 if arch != "qwen2moe" else 10 if experts else 7)
    stages = [ReferenceBackend().open_stage(part, CONFIG) for part in parts]
    batch = make_batch([Piece(PROMPT[:20], PAGES)], 16, [3, 19])
    expected = ReferenceBackend().open_stage(graph, CONFIG).run(batch)
    np.testing.assert_array_equal(StageChain(stages, sources(parts)).run(batch), expected)


def chain_on(device: Device, graph: Graph, *, streams: bool) -> StageChain:
    """The graph's products on this device, by matrices that are there or come, and the rest on the CPU."""
    parts, flags = borrow_products(graph, experts=True)
    gpu, cpu = ([i for i, flag in enumerate(flags) if flag == goes] for goes in (True, False))
    graphs, lasts = [parts[i] for i in gpu], last_readers(parts, gpu)
    on_gpu: Sequence[PartStage]
    if streams:
        kept = [[graphs[n].results[i] for n, i in kept_of(parts, gpu) if n == number] for number in range(len(gpu))]
        borrowed = Borrowed(tuple(graphs), tuple(lasts), tuple(map(tuple, kept)))
        resident, *on_gpu = stages_on(device, [replace(graphs[-1])], CONFIG, borrowed=borrowed)
        resident.close()
    else:
        on_gpu = stages_on(device, graphs, CONFIG, None, lasts)
    on_cpu = CPUBackend().open_stages([parts[i] for i in cpu], CONFIG, None, last_readers(parts, cpu))
    stages = dict(zip([*gpu, *cpu], [*on_gpu, *on_cpu], strict=True))
    return StageChain([stages[i] for i in range(len(parts))], sources(parts))


def kept_of(parts: Sequence[Graph], own: Sequence[int]) -> list[tuple[int, int]]:
    """(number among `own`, which result) of what only these parts read."""
    read = [(place, reader) for reader, places in enumerate(sources(parts)) for place in places]
    away = {place for place, reader in read if reader not in own}
    return [
        (own.index(part), i)
        for part, i in dict.fromkeys(place for place, _ in read if place not in away)
        if part in own
    ]


def steps(chain: StageChain) -> list[npt.NDArray[np.float32]]:
    batches = [
        make_batch([Piece(PROMPT[:20], PAGES)], 16, []),
        make_batch([Piece(PROMPT[20:32], PAGES, 20), Piece(PROMPT[:10], [7, 1])], 16, []),
        make_batch([Piece(PROMPT[32:44], PAGES, 32), Piece(PROMPT[10:20], [7, 1], 10)], 16, []),
    ]
    return [chain.run(batch).copy() for batch in batches]


def part_of(graph: Graph) -> Graph:
    """The first two blocks, as they would be on a CPU."""
    return split_graph(graph, [block_cuts(graph)[2]])[0]


@pytest.mark.parametrize("arch, codec", [("llama", "Q4_0"), ("qwen2", "Q6_K"), ("gemma3", "F16"), ("qwen2moe", "F16")])
def test_matrices_that_come_compute_what_those_there_do(arch: str, codec: str, tiny_model: TinyModel) -> None:
    """Bit by bit, copied from where the file is mapped or through pinned pieces by a thread."""
    graph = part_of(graph_of(tiny_model(arch, codec, shape=SHAPE)))
    found: list[list[npt.NDArray[np.float32]]] = []
    for streams, pins in ((False, True), (True, True), (True, False)):
        device = EmulatedDevice()
        device.can_pin = pins
        chain = chain_on(device, graph, streams=streams)
        found.append(steps(chain))
        n_parts = sum(borrow_products(graph, experts=True)[1])
        assert device.launches.get("copy aside", 0) == (3 * n_parts if streams else 0)
        chain.close()
    for there, pinned, copied in zip(*found, strict=True):
        assert there.shape[1] == graph.n_embd and len(there) > 8
        np.testing.assert_array_equal(pinned, there)
        np.testing.assert_array_equal(copied, there)
    expected = [ReferenceBackend().open_stage(graph, CONFIG).run(make_batch([Piece(PROMPT[:20], PAGES)], 16, []))]
    assert np.abs(found[0][0] - expected[0]).max() < 4e-2 * np.abs(expected[0]).max()


@pytest.mark.parametrize("pins", [True, False])
def test_on_a_gpu_that_works_late(pins: bool, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's device: copies on the second stream happen when they must, and not before what they would overwrite was read.

    Where memory can be pinned, the CPU's rows are copied late too.
    """
    monkeypatch.setattr(stage_module, "_WORTH_PINNING", 1)
    graph = part_of(graph_of(tiny_model("llama", "Q4_K", shape=SHAPE)))
    there = chain_on(EmulatedDevice(), graph, streams=False)
    expected = steps(there)
    there.close()
    for eager in (False, True):
        fake = FakeCUDA()
        fake.can_register, fake.is_aside_eager = pins, eager
        with fake_cuda(fake) as module:
            chain = chain_on(module.CuPyDevice(0), graph, streams=True)
            lender = next(stage for stage in chain.stages if isinstance(stage, PinningStage))
            n_spans = len(fake.registered)
            lender.pin([rows for stage in chain.stages if isinstance(stage, HostStage) for rows in stage.result_memory])
            assert (len(fake.registered) > n_spans) == pins
            assert bool(fake.registered) == pins
            for found, right in zip(steps(chain), expected, strict=True):
                np.testing.assert_array_equal(found, right)
            chain.close()
            assert not fake.registered and not fake.allocated


def test_a_step_that_failed_leaves_no_copies(tiny_model: TinyModel) -> None:
    graph = part_of(graph_of(tiny_model("llama", "Q4_0", shape=SHAPE)))
    device = EmulatedDevice()
    device.can_pin = False
    chain = chain_on(device, graph, streams=True)
    expected = steps(chain)
    broken: Any = chain.stages[2]

    def fall_over(batch: object) -> None:
        raise RuntimeError("over")

    whole, broken.run_part = broken.run_part, fall_over
    with pytest.raises(RuntimeError, match="over"):
        steps(chain)
    broken.run_part = whole
    for found, right in zip(steps(chain), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    chain.close()


def test_pages_of_arrays() -> None:
    size = mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, 16 * size), np.uint8)
    start = memory.ctypes.data

    def spans(*places: tuple[int, int]) -> list[tuple[int, int]]:
        arrays = [memory[first:end] for first, end in places]
        return [((first - start) // size, (end - start) // size) for first, end in page_spans(arrays)]

    assert spans((0, 10)) == [(0, 1)]
    assert spans((3 * size + 5, 5 * size), (100, 2 * size - 1)) == [(0, 2), (3, 5)]
    assert spans((0, size + 1), (size + 7, 3 * size)) == [(0, 3)]
    assert spans((0, size), (size, 2 * size)) == [(0, 2)]
