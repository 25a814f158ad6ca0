"""Float16 copies of matrices, and measuring which way large products go: a tiny model on the emulated device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import Piece, make_batch
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceStage
from pyinfer.graph.split import expandable_weights
from pyinfer.kernels_gpu import route_measure
from pyinfer.kernels_gpu.expand import make_copies
from pyinfer.kernels_gpu.matmul import gain_of
from pyinfer.kernels_gpu.matmul_route import Problem, Route, RouteTable, default_route, slice_options, tiling_options
from pyinfer.kernels_gpu.mma_tiling import GPU
from pyinfer.kernels_gpu.route_measure import RouteCache, measure_routes
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.stage_plan import copies_bytes

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]

TinyModel = Callable[..., Path]
CONFIG = StageConfig(n_pages=8, block_size=16, max_tokens=96, max_sequences=2, n_ctx=128)
H200 = GPU(90, 132, 227 << 10)


@pytest.fixture
def graph(tiny_model: TinyModel) -> Graph:
    return optimize(build_graph(GGUFFile.open(tiny_model(codec="Q5_1"))))


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


class Clock:
    """Seconds that pass only while the device runs: as many as a product's route is slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: EmulatedDevice, mma: float, gemm: float) -> None:
        self.now, self.runs = 0.0, 0

        def run(executable: list[Any]) -> None:
            self.runs += 1
            self.now += mma if executable[0].kernel.name == "matmul_mma" else gemm

        monkeypatch.setattr(device, "run", run)
        monkeypatch.setattr(device, "prepare", lambda kernels: None)

    def __call__(self) -> float:
        return self.now


def test_copies_are_the_weights(graph: Graph, device: EmulatedDevice) -> None:
    memory = StageMemory(device, graph, CONFIG)
    memory.share.weights.load()
    copies = make_copies(device, graph, memory.share.weights)
    tensors = list(expandable_weights(graph))
    assert len(copies) == len(tensors) > 4 and not any(tensor.name.split(".")[0] == "output" for tensor in tensors)
    assert copies_bytes(graph) == sum(copy.n_bytes for copy in copies.values())
    for tensor in tensors:
        copy = device.values(copies[memory.weights[tensor].buffer.ptr], np.float16, *tensor.shape)
        exact = tensor.dequantize() * np.float32(gain_of(tensor.codec.name))
        assert np.abs(copy - exact).max() <= 2**-11 * np.abs(exact).max()


def test_a_stage_with_copies_gives_the_same_logits(graph: Graph, device: EmulatedDevice) -> None:
    ids = np.random.default_rng(3).integers(0, 300, 90).tolist()
    batch = make_batch([Piece(ids, range(6))], CONFIG.block_size, [0, 45, 89])
    expected = ReferenceStage(graph, CONFIG).run(batch)
    stage = GPUStage(device, graph, replace(CONFIG, gpu_expand=True))
    stage._memory.routes.measured.update(
        {(problem, True): Route(64) for problem, _ in route_measure._problems(stage._memory, 96)}
    )
    device.launches.clear()
    got = stage.run(batch)
    assert device.launches["gemm"] > 4 and "dequantize" not in device.launches
    assert np.abs(got - expected).max() <= 2e-2 * np.abs(expected).max()


def test_the_faster_way_is_taken_and_remembered(
    graph: Graph, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for mma, gemm in ((1.0, 2.0), (2.0, 1.0)):
        folder = tmp_path / str(mma)
        memory = StageMemory(device, graph, CONFIG)
        clock = Clock(monkeypatch, device, mma, gemm)
        measure_routes(memory, (8, 64, 96), RouteCache("one", folder), clock)
        found = memory.routes.measured
        assert {problem.m for problem, _ in found} == {64, 96}
        assert all((route.tiling is None) == (route.slice_rows > 0) for route in found.values())
        assert all((route.slice_rows == 0) == (mma < gemm) for route in found.values())
        assert clock.runs > 0
        clock.runs = 0
        again = StageMemory(device, graph, CONFIG)
        measure_routes(again, (8, 64, 96), RouteCache("one", folder), clock)
        assert again.routes.measured == found and clock.runs == 0
        measure_routes(StageMemory(device, graph, CONFIG), (64,), RouteCache("another", folder), clock)
        assert clock.runs > 0


def test_a_broken_cache_is_measured_anew(tmp_path: Path) -> None:
    cache = RouteCache("one", tmp_path)
    problem = Problem("Q4_K", 64, (512,), 256)
    other = tiling_options(problem, H200, 1)[0]
    cache.put(problem, False, Route(7))
    cache.put(problem, True, other)
    cache.save()
    assert RouteCache("one", tmp_path).get(problem, False) == Route(7)
    assert RouteCache("one", tmp_path).get(problem, True) == other
    assert RouteCache("two", tmp_path).get(problem, True) is None
    (path,) = tmp_path.iterdir()
    for text in ("{", "[]", '{"a": null}', path.read_text().replace("7", "7, 7")):
        path.write_text(text)
        assert RouteCache("one", tmp_path).get(problem, False) is None


def test_the_model_without_measurements() -> None:
    """Few rows read packed weights, thousands go through float16, sooner where a copy is kept; what was measured wins."""
    for widths, columns in (((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)):
        routes = [default_route(Problem("Q4_K", m, widths, columns), H200, is_float16=False) for m in (16, 64, 2048)]
        assert [bool(route.slice_rows) for route in routes] == [False, False, True]
    down = Problem("Q4_K", 256, (4096,), 14336)
    assert not default_route(down, H200, is_float16=False).slice_rows
    assert default_route(down, H200, is_float16=True).slice_rows
    table = RouteTable(H200, {(down, False): Route(1024)})
    assert table.route(down, is_float16=False) == Route(1024)
    assert all(option.slice_rows for option in slice_options(down))
