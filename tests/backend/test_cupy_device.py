"""`CuPyDevice` over a CUDA that does its work late, on the emulator: order, memory, captures, and a whole stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import Piece, make_batch
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from fake_cuda import FakeCUDA, as_floats, fake_cuda

from pyinfer.errors import BackendError, DeviceLostError, DeviceMemoryError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.passes import optimize
from pyinfer.kernels_gpu import cublas
from pyinfer.kernels_gpu.launch import Gemm, GemmType, Kernel, Launch
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="there is no g++")]

SCALE = """
#include "ptx.cuh"
extern "C" __global__ void scale(float* x, int n, float by, long long add) {
  DYNAMIC_SHARED(float, unused);
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) x[i] = x[i] * by + add;
}
"""


@pytest.fixture
def cuda() -> FakeCUDA:
    return FakeCUDA()


@pytest.fixture
def device(cuda: FakeCUDA) -> Iterator[Any]:
    with fake_cuda(cuda) as module:
        device = module.CuPyDevice(0)
        yield device
        device.close()
        assert cuda.free == cuda.total and not cuda.pinned, "memory was not given back"


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    path = tmp_path / "scale.cu"
    path.write_text(SCALE)
    return Kernel(str(path), "scale")


def scale(kernel: Kernel, buffer: Any, n: int, by: float, add: int, **more: Any) -> Launch:
    return Launch(kernel, (-(-n // 64), 1, 1), (64, 1, 1), (buffer, n, by, np.int64(add)), **more)


def test_what_it_says_of_itself(device: Any, cuda: FakeCUDA) -> None:
    assert (device.name, device.arch, device.n_sms, device.shared_bytes) == ("Fake GPU", 90, 4, 227 << 10)
    assert device.memory() == (cuda.free, cuda.total)


def test_small_buffers_share_memory_and_are_aligned(device: Any, cuda: FakeCUDA) -> None:
    buffers = [device.alloc(n) for n in (1, 300, 4096, 5)]
    assert len(cuda.allocated) == 1
    assert all((b.ptr - buffers[0].ptr) % 256 == 0 for b in buffers)
    assert all(a.ptr + a.n_bytes <= b.ptr for a, b in pairwise(buffers))
    device.alloc(20 << 20)
    assert len(cuda.allocated) == 2


def test_memory_that_is_not_there(device: Any) -> None:
    with pytest.raises(DeviceMemoryError, match=r"GPU 0 \(Fake GPU\) has 1024 MiB free of 1024 and 2048 MiB more"):
        device.alloc(2 << 30)


@pytest.mark.parametrize("n", [100, 300_000, 9_000_000])
def test_uploads_and_downloads(device: Any, n: int) -> None:
    """Through pinned memory or not, in pieces or whole: the bytes arrive."""
    x, buffer = as_floats(n), device.alloc(4 * n + 64)
    device.upload(buffer, x, 64)
    x_before = x.copy()
    x[:] = 0  # pageable memory may change once the call is back
    out = np.empty(n, np.float32)
    device.download(buffer, out, 64)
    assert (out == x_before).all()


def test_copies_from_pinned_memory_wait(device: Any, cuda: FakeCUDA) -> None:
    host, buffer = device.alloc_pinned(400).view(np.float32), device.alloc(400)
    host[:] = 1
    device.upload(buffer, host)
    assert cuda.queue, "it did not return at once"
    device.synchronize()
    host[:] = 2
    out = device.alloc_pinned(400).view(np.float32)
    out[:] = 0
    device.download(buffer, out)
    assert (out == 0).all()
    device.synchronize()
    assert (out == 1).all()


def test_launches_and_graphs(device: Any, cuda: FakeCUDA, kernel: Kernel) -> None:
    x, buffer = as_floats(100), device.alloc(400)
    device.upload(buffer, x)
    device.launch(scale(kernel, buffer, 100, 2.0, 1 << 40))
    graph = device.capture([scale(kernel, buffer, 100, 0.5, 3), scale(kernel, buffer, 50, 2.0, 0)])
    expected = x * np.float32(2) + np.float32(1 << 40)
    out = np.empty(100, np.float32)
    for _ in range(2):
        device.run(graph)
        expected = expected * np.float32(0.5) + np.float32(3)
        expected[:50] *= 2
        device.download(buffer, out)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert cuda.graphs == 1 and len(cuda.units) == 1 and len(cuda.functions) == 1


def test_much_shared_memory_is_asked_for_once(device: Any, cuda: FakeCUDA, kernel: Kernel) -> None:
    buffer = device.alloc(400)
    for n_bytes in (1024, 100 << 10, 60 << 10, 120 << 10):
        device.launch(scale(kernel, buffer, 100, 1.0, 0, shared_bytes=n_bytes))
    assert list(cuda.dynamic_shared.values()) == [120 << 10]
    device.synchronize()


def test_a_refused_launch_is_named(device: Any, kernel: Kernel) -> None:
    with pytest.raises(
        BackendError, match=r"refuses to launch .*scale\.cu:scale on \(2, 1, 1\) x \(64, 1, 1\): error 1"
    ):
        device.launch(scale(kernel, device.alloc(400), 100, 1.0, 0, shared_bytes=300 << 10))


def test_shared_memory_that_is_declared_counts_too(device: Any, tmp_path: Path) -> None:
    """Without asking a launch gets 48 KiB less what its function declares."""
    path = tmp_path / "both.cu"
    text = SCALE.replace("  const int i", "  __shared__ int declared[64];\n  declared[threadIdx.x] = 0;\n  const int i")
    path.write_text(text)
    device.launch(scale(Kernel(str(path), "scale"), device.alloc(400), 100, 1.0, 0, shared_bytes=48 << 10))
    device.synchronize()


@pytest.mark.parametrize("version, capability, overlaps", [(12080, (9, 0), 1), (12020, (9, 0), 0), (12080, (8, 9), 0)])
def test_overlap_only_where_graphs_keep_it(
    version: int, capability: tuple[int, int], overlaps: int, kernel: Kernel
) -> None:
    cuda = FakeCUDA(driver_version=version, capability=capability)
    with fake_cuda(cuda) as module:
        device = module.CuPyDevice(0)
        device.launch(scale(kernel, device.alloc(400), 100, 1.0, 0, overlap=True))
        device.launch(scale(kernel, device.alloc(400), 100, 1.0, 0))
        assert cuda.overlapping == overlaps
        device.close()


@pytest.mark.parametrize("kind, dtype", [("f16", np.float16), ("f32", np.float32)])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_cublas_products(device: Any, kind: GemmType, dtype: Any, accumulate: bool, halves: bool) -> None:
    """In a graph, whose first run finds what the launch before it left."""
    result = np.float16 if halves else np.float32
    x, w, before = as_floats(3 * 8, 1).reshape(3, 8), as_floats(5 * 12, 2).reshape(5, 12), as_floats(3 * 7, 3)
    x, w, before = x.astype(dtype), w.astype(dtype), before.astype(result)
    buffers = [device.alloc(values.nbytes) for values in (x, w, before)]
    for buffer, values in zip(buffers, (x, w, before), strict=True):
        device.upload(buffer, values)
    gemm = Gemm(
        buffers[2], buffers[0], buffers[1], 3, 5, 8, 7, accumulate=accumulate, alpha=2.0, kind=kind, w_stride=12,
        halves=halves,
    )  # fmt: skip
    graph = device.capture([gemm])
    device.upload(buffers[2], before)
    device.run(graph)
    out = np.empty((3, 7), result)
    device.download(buffers[2], out)
    expected = before.reshape(3, 7).astype(np.float32)
    product = 2 * (x.astype(np.float32) @ w[:, :8].astype(np.float32).T)
    expected[:, :5] = product + (expected[:, :5] if accumulate else 0)
    np.testing.assert_allclose(out, expected, rtol=1e-3 if halves else 1e-5)


def test_without_cublas_one_line_says_what_to_install(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublas, "find_libraries", lambda name: ["libnowhere.so.12"])
    x = device.alloc(1024)
    with pytest.raises(BackendError, match=r"^no cuBLAS was found; pip install 'pyinfer-gguf\[gpu\]'$"):
        device.launch(Gemm(x, x, x, 1, 1, 8, 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda device, buffer, step: device.synchronize(),
        lambda device, buffer, step: device.memory(),
        lambda device, buffer, step: device.upload(buffer, np.zeros(10, np.float32)),
        lambda device, buffer, step: device.download(buffer, np.zeros(10, np.float32)),
        lambda device, buffer, step: device.alloc(100 << 20),
        lambda device, buffer, step: device.launch(step),
        lambda device, buffer, step: device.capture([step]),
    ],
)
def test_after_a_fault_the_device_is_lost(call: Callable[..., object], kernel: Kernel) -> None:
    """Whatever is called next says so, and what it cost is not hidden by an error at the end."""
    cuda = FakeCUDA()
    with fake_cuda(cuda) as module:
        device = module.CuPyDevice(0)
        buffer = device.alloc(400)
        step = scale(kernel, buffer, 100, 1.0, 0)
        device.launch(step)
        device.synchronize()
        cuda.has_faulted = True
        with pytest.raises(DeviceLostError, match=r"^GPU 0 \(Fake GPU\) failed: .*(illegal memory access|error 700)"):
            call(device, buffer, step)
        device.close()


def test_a_refused_launch_leaves_no_capture_behind(device: Any, cuda: FakeCUDA, kernel: Kernel) -> None:
    buffer = device.alloc(400)
    step = scale(kernel, buffer, 100, 2.0, 0)
    with pytest.raises(BackendError, match="refuses to launch") as caught:
        device.capture([step, scale(kernel, buffer, 100, 1.0, 0, shared_bytes=300 << 10)])
    assert not isinstance(caught.value, DeviceLostError | DeviceMemoryError)
    device.upload(buffer, np.ones(100, np.float32))
    device.run(device.capture([step]))
    out = np.empty(100, np.float32)
    device.download(buffer, out)
    assert (out == 2).all()


def test_a_graph_without_memory(device: Any, cuda: FakeCUDA, kernel: Kernel) -> None:
    cuda.refuses_graphs = True
    step = scale(kernel, device.alloc(400), 100, 2.0, 0)
    with pytest.raises(DeviceMemoryError, match=r"^GPU 0 \(Fake GPU\) failed: cudaErrorMemoryAllocation"):
        device.capture([step])
    cuda.refuses_graphs = False
    device.run(device.capture([step]))


def test_a_whole_stage(tiny_model: Callable[..., Path], cuda: FakeCUDA) -> None:
    """The same launches, and the host waits wherever it has to."""
    graph = optimize(build_graph(GGUFFile.open(tiny_model("qwen2", "Q8_0"))))
    config = StageConfig(n_pages=16, max_tokens=64, max_sequences=12, n_ctx=160)
    with fake_cuda(cuda) as module:
        stage, expected = GPUStage(module.CuPyDevice(0), graph, config), GPUStage(EmulatedDevice(), graph, config)
        ids = np.random.RandomState(5).randint(0, 300, 60).tolist()
        for start, n in ((0, 20), (20, 1), (21, 1), (22, 3), (25, 20)):
            batch = make_batch([Piece(ids[start : start + n], [3, 1, 7], start)], 16)
            assert (stage.run(batch) == expected.run(batch)).all()
        stage.copy_page(3, 9)
        stage.copy_page(1, 4)
        stage.write_pages([12], stage.read_pages([7]))
        batch = make_batch([Piece(ids[45:46], [9, 4, 12], 45)], 16)
        moved = stage.run(batch).copy()
        assert (moved == expected.run(make_batch([Piece(ids[45:46], [3, 1, 7], 45)], 16))).all()
        stage.close()
        expected.close()
    assert cuda.free == cuda.total and not cuda.pinned
