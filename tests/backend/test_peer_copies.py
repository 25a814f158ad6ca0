"""Parts on several GPUs: rows go from one device's memory to the other's, in order, or through the host where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from fake_cuda import FakeCUDA, as_floats, fake_cuda
from tiny_models import TinyShape

from pyinfer.graph.backend import Stage, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.graph.split import block_cuts, split_graph
from pyinfer.kernels_gpu.launch import Kernel, Launch
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.stage_chain import StageChain

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="there is no g++")]
CONFIG = StageConfig(n_pages=16, max_tokens=32, max_sequences=8, n_ctx=96)
IDS: list[int] = np.random.RandomState(5).randint(0, 300, 60).tolist()
F32 = npt.NDArray[np.float32]


@pytest.fixture
def graph(tiny_model: Callable[..., Path]) -> Graph:
    return optimize(build_graph(GGUFFile.open(tiny_model("qwen2", "Q8_0", shape=TinyShape(n_layers=3)))))


def steps(stage: Stage) -> list[F32]:
    """A prompt without outputs, another beside a token, tokens."""
    batches = [
        make_batch([Piece(IDS[:20], [3, 1])], 16, []),
        make_batch([Piece(IDS[20:21], [3, 1], 20), Piece(IDS[30:40], [5])], 16, [0, 10]),
        make_batch([Piece(IDS[21:22], [3, 1], 21), Piece(IDS[40:41], [5], 10)], 16),
        make_batch([Piece(IDS[22:23], [3, 1], 22)], 16),
    ]
    return [stage.run(batch).copy() for batch in batches]


@pytest.mark.parametrize("peers", [True, False])
def test_three_gpus_compute_what_one_does(peers: bool, graph: Graph) -> None:
    cuts = block_cuts(graph)
    devices = [EmulatedDevice() for _ in range(3)]
    for device in devices:
        device.peers = peers
    parts = split_graph(graph, [cuts[1], cuts[2]])
    whole = GPUStage(EmulatedDevice(), graph, CONFIG)
    chain = StageChain([GPUStage(device, part, CONFIG) for device, part in zip(devices, parts, strict=True)])
    for found, expected in zip(steps(chain), steps(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [device.launches.get("receive", 0) for device in devices] == ([0, 4, 4] if peers else [0, 0, 0])
    chain.close()
    whole.close()


def test_more_outputs_than_a_program_has_go_through_the_host(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyinfer.kernels_gpu.stage._MAX_OUTPUTS", 8)
    devices = [EmulatedDevice(), EmulatedDevice()]
    parts = split_graph(graph, block_cuts(graph)[1:2])
    chain = StageChain([GPUStage(device, part, CONFIG) for device, part in zip(devices, parts, strict=True)])
    whole = GPUStage(EmulatedDevice(), graph, CONFIG)
    batch = make_batch([Piece(IDS[:20], [3, 1])], 16, list(range(20)))
    assert np.abs(chain.run(batch) - whole.run(batch)).max() < 1e-1
    assert "receive" not in devices[1].launches
    chain.close()
    whole.close()


@pytest.mark.parametrize("eager", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("peers", [True, False])
def test_streams_wait_for_each_other(eager: tuple[int, ...], peers: bool, graph: Graph) -> None:
    """Whichever of the devices is early or late."""
    cuda = FakeCUDA(eager=eager, peers=peers)
    whole = GPUStage(EmulatedDevice(), graph, CONFIG)
    with fake_cuda(cuda) as module:
        parts = split_graph(graph, block_cuts(graph)[1:2])
        chain = StageChain([GPUStage(module.CuPyDevice(i), part, CONFIG) for i, part in enumerate(parts)])
        for found, expected in zip(steps(chain), steps(whole), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert cuda.peer_copies == (4 if peers else 0)
        chain.close()
    assert cuda.free == cuda.total and not cuda.pinned
    whole.close()


SCALE = """
#include "ptx.cuh"
extern "C" __global__ void scale(float* x, int n, float by) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) x[i] = x[i] * by;
}
"""


@pytest.mark.parametrize("eager", [(), (0,), (1,)])
def test_what_is_sent_is_not_written_over(eager: tuple[int, ...], tmp_path: Path) -> None:
    """The sender goes on with other work before the copy has happened."""
    path = tmp_path / "scale.cu"
    path.write_text(SCALE)
    kernel = Kernel(str(path), "scale")
    cuda = FakeCUDA(eager=eager)
    with fake_cuda(cuda) as module:
        first, second = module.CuPyDevice(0), module.CuPyDevice(1)
        assert second.can_receive(first) and second.can_receive(first) and not first.can_receive(first)
        x, buffer, target = as_floats(64), first.alloc(256), second.alloc(1024)
        first.upload(buffer, x)
        for i in range(4):
            first.launch(Launch(kernel, (1, 1, 1), (64, 1, 1), (buffer, 64, 2.0)))
            second.receive(first, target.at(256 * i), buffer, 256)
        out = np.empty((4, 64), np.float32)
        second.download(target, out)
        np.testing.assert_array_equal(out, [x * np.float32(2 ** (i + 1)) for i in range(4)])
        first.close()
        second.close()
