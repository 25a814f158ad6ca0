"""The emulator that the tests of GPU kernels stand on: right results, and an error for what a GPU would not forgive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import EmulatorError, has_compiler
from cuda_emulator.device import EmulatedDevice

from pyinfer.errors import DeviceMemoryError
from pyinfer.kernels_gpu.launch import Buffer, Gemm, Kernel, Launch

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="there is no g++")]

F32 = npt.NDArray[np.float32]
SOURCE = """
#include "ptx.cuh"
extern "C" __global__ void sum(const float* x, float* out, int n, float scale) {
  __shared__ float part[32];
  float v = 0.0f;
  for (int i = threadIdx.x + blockIdx.x * blockDim.x; i < n; i += blockDim.x * gridDim.x) v += x[i];
  v = warp_sum(v);
  if (lane_id() == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  v = warp_sum(threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) atomicAdd(out, v * scale);
}
extern "C" __global__ void shuffles(const int* x, int* out) {
  const int lane = threadIdx.x, v = x[lane];
  out[lane] = __shfl_sync(FULL_WARP, v, 3);
  out[32 + lane] = __shfl_down_sync(FULL_WARP, v, 5);
  out[64 + lane] = __shfl_up_sync(FULL_WARP, v, 2, 8);
  out[96 + lane] = __shfl_xor_sync(FULL_WARP, v, 9);
  out[128 + lane] = __ballot_sync(FULL_WARP, v & 1);
  out[160 + lane] = lane < 16 ? __shfl_xor_sync(0xffffu, v, 1) : __shfl_xor_sync(0xffff0000u, v, 2);
}
extern "C" __global__ void products(const half* a, const half* b, const int8_t* c, const int8_t* d, float* out, int* out8) {
  __shared__ __align__(16) half sa[16 * 16], sb[8 * 16];
  const int l = threadIdx.x, g = l / 4, t = l % 4;
  cp_async16(sa + 8 * l, a + 8 * l);
  cp_async16(sb + 8 * (l % 16), b + 8 * (l % 16));
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, sa + l % 16 * 16 + l / 16 * 8);
  ldmatrix_x2(fb, sb + l % 8 * 16 + l / 8 % 2 * 8);
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_f16(sum, fa, fb);
  int sum8[4] = {0, 0, 0, 0};
  for (int r = 0; r < 4; r++) memcpy(&fa[r], c + (g + 8 * (r & 1)) * 32 + 4 * t + 16 * (r >> 1), 4);
  for (int r = 0; r < 2; r++) memcpy(&fb[r], d + g * 32 + 4 * t + 16 * r, 4);
  mma_s8(sum8, fa, fb);
  for (int i = 0; i < 4; i++) out[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = sum[i];
  for (int i = 0; i < 4; i++) out8[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = sum8[i];
}
extern "C" __global__ void transposed(const uint16_t* x, uint16_t* out) {
  __shared__ __align__(16) uint16_t tile[64];
  const int l = threadIdx.x;
  for (int i = l; i < 64; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t r[2];
  ldmatrix_x2<true>(r, tile + l % 8 * 8);
  out[l / 4 * 8 + 2 * (l % 4)] = r[1] & 0xffff;
  out[l / 4 * 8 + 2 * (l % 4) + 1] = r[1] >> 16;
}
extern "C" __global__ void halves(const float* x, half* out, float* back) {
  const int i = threadIdx.x;
  out[i] = __float2half_rn(x[i]);
  back[i] = __half2float(out[i]);
}
extern "C" __global__ void dynamic(float* out, int n) {
  DYNAMIC_SHARED(float, values);
  if (threadIdx.x < n) values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[n - 1 - threadIdx.x];
}
// ---- what must be found
extern "C" __global__ void past_end(float* x, int at, int write) {
  if (write) x[at] = 1.0f; else x[0] = x[at];
}
extern "C" __global__ void left_early(float* x) {
  if (threadIdx.x > 5) return;
  x[0] = warp_sum(x[0]);
}
extern "C" __global__ void left_before_barrier(float* x) {
  if (threadIdx.x > 31) return;
  __syncthreads();
  x[0] = 1.0f;
}
extern "C" __global__ void two_barriers(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  x[0] = 1.0f;
}
extern "C" __global__ void two_shuffles(int* x) {
  x[threadIdx.x] = threadIdx.x & 1 ? __shfl_xor_sync(FULL_WARP, 1, 1) : __shfl_down_sync(FULL_WARP, 1, 1);
}
extern "C" __global__ void no_barrier(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  x[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void misaligned(float* x) { x[0] = reinterpret_cast<float4*>(x + 1)->x; }
extern "C" __global__ void shared_bounds(float* x, int offset) {
  __shared__ float s[64];
  s[threadIdx.x + offset] = 1.0f;
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void not_waited(const float* x, float* out) {
  __shared__ __align__(16) float s[128];
  cp_async16(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kernel]:
    path = tmp_path_factory.mktemp("cuda") / "test.cu"
    path.write_text(SOURCE)
    return lambda name: Kernel(str(path), name)


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def device(request: pytest.FixtureRequest) -> Iterator[EmulatedDevice]:
    device = EmulatedDevice(descending=request.param)
    yield device
    device.close()


Run = Callable[..., None]


@pytest.fixture
def run(device: EmulatedDevice, kernel: Callable[[str], Kernel]) -> Run:
    def launch(
        name: str, *args: Buffer | int | float | np.int64 | None, threads: int = 64, grid: int = 1, shared: int = 0
    ) -> None:
        device.launch(Launch(kernel(name), (grid, 1, 1), (threads, 1, 1), args, shared))

    return launch


def test_blocks_barriers_and_sums(device: EmulatedDevice, run: Run) -> None:
    x = np.random.default_rng(0).normal(size=1001).astype(np.float32)
    out = device.array(np.zeros(1, np.float32))
    run("sum", device.array(x), out, len(x), 2.0, threads=128, grid=3)
    np.testing.assert_allclose(device.values(out, np.float32)[0], 2 * x.sum(dtype=np.float64), rtol=1e-5)


def test_shuffles(device: EmulatedDevice, run: Run) -> None:
    x = np.arange(100, 132, dtype=np.int32) ** 2
    out, lane = device.empty(6, 32, dtype=np.int32), np.arange(32)
    run("shuffles", device.array(x), out, threads=32)
    got = device.values(out, np.int32, 6, 32)
    assert (got[0] == x[3]).all()
    assert (got[1] == x[np.where(lane + 5 < 32, lane + 5, lane)]).all()
    assert (got[2] == x[np.where(lane % 8 >= 2, lane - 2, lane)]).all()
    assert (got[3] == x[lane ^ 9]).all()
    assert (got[4].view(np.uint32) == 0xAAAAAAAA).all()
    assert (got[5] == x[np.where(lane < 16, lane ^ 1, lane ^ 2)]).all()


def test_products(device: EmulatedDevice, run: Run) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(16, 16)).astype(np.float16), rng.normal(size=(8, 16)).astype(np.float16)
    c, d = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, 32), (8, 32)))
    out, out8 = device.empty(16, 8), device.empty(16, 8, dtype=np.int32)
    run("products", *(device.array(m) for m in (a, b, c, d)), out, out8, threads=32)
    expected = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(device.values(out, np.float32, 16, 8), expected, atol=1e-5)
    assert (device.values(out8, np.int32, 16, 8) == c.astype(int) @ d.astype(int).T).all()


def test_transposed_tiles(device: EmulatedDevice, run: Run) -> None:
    x = np.random.default_rng(2).integers(0, 65536, (8, 8)).astype(np.uint16)
    out = device.empty(8, 8, dtype=np.uint16)
    run("transposed", device.array(x), out, threads=32)
    assert (device.values(out, np.uint16, 8, 8) == x.T).all()


def test_float16_equals_numpy(device: EmulatedDevice, run: Run) -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=1024) * 10.0 ** rng.uniform(-9, 6, 1024)).astype(np.float32)
    x[:4] = np.inf, -np.inf, 0.0, 65520.0
    out, back = device.empty(1024, dtype=np.float16), device.empty(1024)
    run("halves", device.array(x), out, back, threads=1024)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert (device.values(out, np.float16) == expected).all()
    assert (device.values(back, np.float32) == expected.astype(np.float32)).all()


def test_dynamic_shared_memory(device: EmulatedDevice, run: Run) -> None:
    out = device.empty(64)
    run("dynamic", out, 64, shared=256)
    assert (device.values(out, np.float32) == np.arange(64)[::-1]).all()
    with pytest.raises(EmulatorError, match="dynamic shared memory"):
        run("dynamic", out, 64, shared=64)


@pytest.mark.parametrize(
    "name, threads, message",
    [
        ("left_early", 32, "has left the kernel"),
        ("left_before_barrier", 64, "has left the kernel"),
        ("two_barriers", 64, "different __syncthreads"),
        ("two_shuffles", 32, "different calls|different masks"),
        ("misaligned", 1, "misaligned"),
    ],
)
def test_misuse_is_found(device: EmulatedDevice, run: Run, name: str, threads: int, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run(name, device.array(np.zeros(64, np.float32)), threads=threads)


@pytest.mark.parametrize("write", [0, 1])
@pytest.mark.parametrize("n, at", [(64, 64), (61, 70), (64, -1), (1000, 1024), (4096, 4096 + 500)])
def test_accesses_past_the_ends_are_found(device: EmulatedDevice, run: Run, n: int, at: int, write: int) -> None:
    x = device.array(np.zeros(n, np.float32))
    if at < 0 and not write:
        pytest.skip("the page before a buffer's first byte may be readable")
    with pytest.raises(EmulatorError, match=f"at byte {4 * at} of a buffer of {4 * n} bytes"):
        run("past_end", x, at, write, threads=1)
    run("past_end", x, n - 1, write, threads=1)


def test_shared_bounds_are_checked(device: EmulatedDevice, run: Run) -> None:
    x = device.empty(64)
    run("shared_bounds", x, 0)
    with pytest.raises(EmulatorError, match="out of an array's bounds"):
        run("shared_bounds", x, 1)


def test_a_missing_barrier_shows_in_one_of_both_orders(kernel: Callable[[str], Kernel]) -> None:
    right = []
    for descending in (False, True):
        device = EmulatedDevice(descending=descending)
        x = device.empty(64)
        device.launch(Launch(kernel("no_barrier"), (1, 1, 1), (64, 1, 1), (x,)))
        right.append((device.values(x, np.float32) == np.arange(64)[::-1]).all())
        device.close()
    assert right != [True, True]


def test_copies_are_not_there_before_they_are_waited_for(device: EmulatedDevice, run: Run) -> None:
    out = device.empty(32)
    run("not_waited", device.array(np.ones(128, np.float32)), out, threads=32)
    assert np.isnan(device.values(out, np.float32)).all()


def test_arguments_are_checked_against_the_function(device: EmulatedDevice, run: Run) -> None:
    x = device.empty(4)
    with pytest.raises(EmulatorError, match="arguments are pi, the function takes pii"):
        run("past_end", x, 1, threads=1)
    with pytest.raises(EmulatorError, match="arguments are pfi"):
        run("past_end", x, 1.0, 1, threads=1)
    with pytest.raises(EmulatorError, match=r"232448 \+ 256 bytes of shared memory, of 232448"):
        run("no_barrier", x, shared=227 << 10)
    with pytest.raises(EmulatorError, match="2048 threads"):
        run("past_end", x, 0, 1, threads=2048)


def test_cublas_as_the_emulator_has_it(device: EmulatedDevice) -> None:
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(3, 8)).astype(np.float16), rng.normal(size=(5, 8)).astype(np.float16)
    before = rng.normal(size=(3, 7)).astype(np.float32)
    out = device.array(before)
    device.run(device.capture([Gemm(out, device.array(x), device.array(w), 3, 5, 8, 7, accumulate=True)]))
    expected = before.copy()
    expected[:, :5] += x.astype(np.float32) @ w.astype(np.float32).T
    np.testing.assert_allclose(device.values(out, np.float32, 3, 7), expected, rtol=1e-6)


def test_memory_is_counted_and_given_back() -> None:
    device = EmulatedDevice(n_bytes=1000)
    device.alloc(600)
    assert device.memory() == (400, 1000)
    with pytest.raises(DeviceMemoryError, match="401 bytes"):
        device.alloc(401)
    device.close()
    assert device.memory() == (1000, 1000)


def test_headers_in_conditions(tmp_path: Path) -> None:
    """A header that is skipped once is there when it is included again; lines keep their numbers."""
    path = tmp_path / "x.cu"
    path.write_text('#if 0\n#include "common.cuh"\n#endif\n#include "ptx.cuh"\n#include "common.cuh"\nbroken here;\n')
    device = EmulatedDevice()
    with pytest.raises(EmulatorError, match=r"x\.cu:6:") as caught:
        device.launch(Launch(Kernel(str(path), "f"), (1, 1, 1), (1, 1, 1), ()))
    assert "DEVICE" not in str(caught.value)
