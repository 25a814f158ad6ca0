"""Float16 between the products of a gated layer: only where it is known to fit, and then as near the reference as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceStage
from pyinfer.kernels_gpu import bounds
from pyinfer.kernels_gpu import stage as stage_module
from pyinfer.kernels_gpu.bounds import Lengths, build_row_squares, float16_factor, normed_lengths
from pyinfer.kernels_gpu.launch import Gemm, Launch, Step
from pyinfer.kernels_gpu.matmul_route import Route
from pyinfer.kernels_gpu.route_measure import _problems
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import KINDS, layout_of, pack
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.tensor import QuantTensor
from pyinfer.runtime.models.registry import build_graph

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
CONFIG = StageConfig(n_pages=8, block_size=16, max_tokens=96, max_sequences=2, n_ctx=128)


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", "BF16", "F32"])
def test_squares_of_rows(device: EmulatedDevice, kind: str) -> None:
    assert kind in KINDS
    columns = 512 if kind.endswith("_K") else 96 if kind == "Q8_0" else 75
    codec = codec_by_name(kind)
    values = np.random.default_rng(1).standard_normal((11, columns)).astype(np.float32)
    tensor = QuantTensor("w", codec, (11, columns), codec.quantize(values))
    layout = layout_of(kind, 11, columns)
    weight = DeviceWeight(layout, device.alloc(layout.n_bytes))
    for offset, part in pack(tensor):
        device.upload(weight.buffer, np.ascontiguousarray(part), offset)
    out = device.empty(11)
    device.launch(build_row_squares(out, weight))
    np.testing.assert_allclose(device.values(out, np.float32), (tensor.dequantize() ** 2).sum(1), rtol=1e-5)


def test_what_fits() -> None:
    x = normed_lengths(np.array([1, -2, 1, 1], np.float32))
    assert x.longest == 4 and x.usual == pytest.approx(7**0.5)
    row = Lengths(10, 8)
    assert float16_factor(x, row, row, 4) == 1
    assert float16_factor(x, Lengths(10000, 8), row, 4) is None, "40,000 is more than may be"
    assert float16_factor(x, Lengths(400, 8), Lengths(400, 8), 4) == 128, "each fits, their product is up to 2,560,000"
    assert float16_factor(x, Lengths(10, 1e-2), Lengths(10, 1e-2), 4) is None, "usual numbers would lose digits"
    assert float16_factor(x, Lengths(8000, 1e-1), Lengths(8000, 1e-1), 4) is None, (
        "as they would under so large a factor"
    )
    for broken in (float("nan"), float("inf")):
        assert float16_factor(x, Lengths(broken, broken), row, 4) is None
    assert float16_factor(None, row, row, 4) is None and float16_factor(x, None, row, 4) is None


@pytest.mark.parametrize("kind", ["Q5_1", "Q8_0"])
@pytest.mark.parametrize("by_cublas, largest", [(False, 32768.0), (True, 32768.0), (False, 64.0), (True, 64.0)])
def test_a_stage_with_bounds_gives_the_same_logits(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str, by_cublas: bool, largest: float
) -> None:
    """By cuBLAS gate and up are float16 and sums are added in place; either way the second product's rows have no factors."""
    graph = optimize(build_graph(GGUFFile.open(tiny_model(codec=kind))))
    ids = np.random.default_rng(3).integers(0, 300, 90).tolist()
    # with as many outputs none of the rows is rounded to int8
    batch = make_batch([Piece(ids, range(6))], CONFIG.block_size)
    expected = ReferenceStage(graph, CONFIG).run(batch)
    without = GPUStage(EmulatedDevice(), graph, CONFIG)
    assert not without._memory.lengths
    before = without.run(batch).copy()
    without.close()
    monkeypatch.setattr(stage_module, "BOUNDED_ROWS", 16)
    monkeypatch.setattr(bounds, "_LARGEST", largest)
    device = EmulatedDevice()
    stage = GPUStage(device, graph, replace(CONFIG, gpu_expand=by_cublas))
    if by_cublas:
        problems = [problem for problem, _ in _problems(stage._memory, 96)]
        stage._memory.routes.measured.update({(problem, True): Route(64) for problem in problems})
    assert stage._memory.lengths
    launched, launch = list[Step](), device.launch

    def noted(step: Step) -> None:
        launched.append(step)
        launch(step)

    monkeypatch.setattr(device, "launch", noted)
    got = stage.run(batch).copy()
    stage.close()
    gated = [step for step in launched if isinstance(step, Launch) and step.kernel.name == "gated"]
    assert any(("GATED", "__half") in step.kernel.defines for step in gated) == by_cublas
    assert [step.args[4] for step in gated] == [None] * len(gated), "factors of rows"
    assert any(step.args[2] != 1.0 for step in gated) == (largest < 1000)
    if by_cublas:
        gemms = [step for step in launched if isinstance(step, Gemm)]
        assert any(step.halves for step in gemms) and any(step.accumulate for step in gemms)
        assert all(step.kernel.name != "matmul_finish" for step in launched if isinstance(step, Launch))
    assert np.linalg.norm(got - before) <= 1e-3 * np.linalg.norm(before)
    assert np.linalg.norm(got - expected) <= 2e-2 * np.linalg.norm(expected), "which rounds rows to int8"
