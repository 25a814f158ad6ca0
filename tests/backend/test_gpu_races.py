"""Compiled kernels on emulated threads, every access of memory watched: no two that nothing orders, and what each one costs.

Planted kernels show what is found and that the counts are exact; `large` runs all kernels of a layer of Llama-3.1-8B's shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch
from cpu_kernels import random_blocks, rng_of
from cuda_emulator.build import has_compiler
from gpu_matrices import operand, rows_of_x, upload
from ptx_emulator.trace_device import TracingDevice
from tiny_models import TinyShape, write_tiny_model

from pyinfer.errors import BackendError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.passes import optimize
from pyinfer.graph.sampling import RowSampling
from pyinfer.kernels_gpu import kernel_cache
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.matvec import Product, build_matvec
from pyinfer.kernels_gpu.matvec_tuning import Tuning
from pyinfer.kernels_gpu.nvrtc import load_nvrtc
from pyinfer.kernels_gpu.sample import DeviceSampler
from pyinfer.kernels_gpu.sources import with_includes
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.kernels_gpu.weights_layout import KINDS
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph


def _has_nvrtc() -> bool:
    try:
        load_nvrtc()
    except BackendError:
        return False
    return True


pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(not has_compiler, reason="there is no g++"),
    pytest.mark.skipif(not _has_nvrtc(), reason="there is no NVRTC"),
]

BLOCK = 16
PLANTED = """
// The sum of all blocks' threads by the block that ends last.
extern "C" __global__ void __launch_bounds__(64) merge(int* sums, int* tickets, int* out, int releases, int acquires) {
  __shared__ int is_last;
  sums[blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
  if (releases) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(tickets, 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  if (acquires) __threadfence();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < gridDim.x * 64; i++) sum += __ldcg(sums + i);
    *out = sum;
  }
}

// Each thread gives its number to the one so much further, twice.
extern "C" __global__ void __launch_bounds__(64) exchange(int* out, int further, int sync, int between) {
  __shared__ int values[64];
  for (int turn = 0; turn < 2; turn++) {
    values[threadIdx.x] = threadIdx.x + turn;
    if (sync == 1) __syncwarp();
    if (sync == 2) __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + further) % 64];
    if (between) __syncthreads();
  }
}

// A ring of two stages that all threads fill and read.
extern "C" __global__ void __launch_bounds__(32) ring(const int4* x, int n, int4* out, int between) {
  __shared__ int4 stages[2][32];
  cp_async16(&stages[0][threadIdx.x], x + threadIdx.x);
  cp_async_commit();
  for (int i = 0; i < n; i++) {
    if (i + 1 < n) cp_async16(&stages[(i + 1) % 2][threadIdx.x], x + (i + 1) * 32 + threadIdx.x);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    out[i * 32 + threadIdx.x] = stages[i % 2][threadIdx.x ^ 1];
    if (between) __syncthreads();
  }
}

// Lane l reads 4, 8 and 16 bytes at `stride` times as many, of shared and of global memory.
template <class T>
__device__ int read_one(const int* x, const unsigned char* shared, int stride) {
  const T a = reinterpret_cast<const T*>(shared)[threadIdx.x * stride], b = reinterpret_cast<const T*>(x)[threadIdx.x * stride];
  int sum = 0;
  for (int i = 0; i < sizeof(T) / 4; i++) sum += reinterpret_cast<const int*>(&a)[i] + reinterpret_cast<const int*>(&b)[i];
  return sum;
}
extern "C" __global__ void __launch_bounds__(32) read(const int* x, int* out, int stride, int n) {
  DYNAMIC_SHARED(unsigned char, shared);
  for (int i = threadIdx.x; i < n; i += 32) reinterpret_cast<int*>(shared)[i] = i;
  __syncthreads();
  out[threadIdx.x] = read_one<int>(x, shared, stride) + read_one<int2>(x, shared, stride) + read_one<int4>(x, shared, stride);
}
"""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[TracingDevice]:
    def text_of(name: str) -> str:
        return with_includes("ptx.cuh") + PLANTED if name == "planted.cu" else with_includes(name)

    monkeypatch.setattr(kernel_cache, "with_includes", text_of)
    made = TracingDevice()
    yield made
    made.close()


def launched(device: TracingDevice, name: str, *args: Buffer | int, grid: int = 1, threads: int = 64) -> None:
    shared_bytes = 4 * int(args[-1]) if name == "read" else 0  # type: ignore[arg-type]
    device.launch(Launch(Kernel("planted.cu", name), (grid, 1, 1), (threads, 1, 1), args, shared_bytes))


def races_in(device: TracingDevice) -> set[str]:
    """Kinds of the two accesses and the space of each race."""
    found = [race for traces in device.traces.values() for trace in traces for race in trace.races]
    return {race.first.kind + race.second.kind + race.space for race in found if race.what == "race"}


@pytest.mark.parametrize("releases, acquires", [(1, 1), (0, 1), (1, 0)], ids=["right", "release", "acquire"])
def test_blocks_that_meet_at_a_counter(device: TracingDevice, releases: int, acquires: int) -> None:
    sums, tickets, out = device.empty(3 * 64), device.array(np.zeros(1, np.int32)), device.empty(1)
    launched(device, "merge", sums, tickets, out, releases, acquires, grid=3)
    assert races_in(device) == (set() if releases and acquires else {"wrg"})
    assert device.values(out, np.int32)[0] == 3 * 63 * 32


@pytest.mark.parametrize(
    "further, sync, between, is_right",
    [(1, 2, 1, True), (0, 0, 0, True), (32, 1, 1, False), (1, 0, 1, False), (1, 1, 1, False), (1, 2, 0, False)],
    ids=["right", "its own", "of another warp", "no sync", "sync of the warp", "nothing between turns"],
)
def test_threads_that_exchange(device: TracingDevice, further: int, sync: int, between: int, is_right: bool) -> None:
    launched(device, "exchange", device.empty(64), further, sync, between)
    assert races_in(device) <= {"rws", "wrs"} and bool(races_in(device)) != is_right


@pytest.mark.parametrize("between", [1, 0])
def test_a_ring_is_not_filled_while_others_read_it(device: TracingDevice, between: int) -> None:
    x, out = device.array(np.arange(4 * 32 * 5, dtype=np.int32)), device.empty(4 * 32 * 5)
    launched(device, "ring", x, 5, out, between, threads=32)
    assert ("rps" in races_in(device)) != bool(between)


@pytest.mark.parametrize(
    "stride, passes",
    [(1, (1, 2, 4)), (2, (2, 4, 8)), (32, (32, 32, 32)), (33, (1, 2, 4)), (3, (1, 2, 4)), (0, (1, 2, 4))],
)
def test_bank_conflicts_and_sectors_are_counted(device: TracingDevice, stride: int, passes: tuple[int, ...]) -> None:
    n = 4 * 32 * max(stride, 1)
    launched(device, "read", device.array(np.zeros(n, np.int32)), device.empty(32), stride, n, threads=32)
    ((trace,),) = device.traces.values()
    loads = {(each.space, each.bytes // 128): each for each in trace.sites if each.kind == "r"}
    assert [loads["s", words].passes for words in (1, 2, 4)] == list(passes)
    assert [loads["s", words].ideal_passes for words in (1, 2, 4)] == [1, 2, 4]
    for words in (1, 2, 4):
        counts, distinct = loads["g", words], 32 if stride else 1
        sectors = {
            byte // 32
            for lane in range(32)
            for byte in range(4 * words * stride * lane, 4 * words * (stride * lane + 1))
        }
        assert (counts.sectors, counts.ideal_sectors) == (len(sectors), -(-4 * words * distinct // 32))


# ---- the kernels
def test_sums_of_a_block_and_of_split_rows(device: TracingDevice) -> None:
    rng = rng_of("races")
    x, weight, out = (device.array(rng.standard_normal(n).astype(np.float32)) for n in (2 * 512, 512, 2 * 512))
    defines = (("WIDTH", 512), ("THREADS", 128), ("OUT", 0), ("BEFORE", 0))
    args = (x, weight, 1e-5, None, 0.0, None, None, None, out, None, None)
    device.launch(Launch(Kernel("rows.cu", "rms_norm", defines), (2, 1, 1), (128, 1, 1), args))
    rows, _ = operand(device, rows_of_x(2, 1024, rng), "a8")
    product = Product(upload(device, "Q8_0", random_blocks("Q8_0", 40, 1024, rng), 1024), device.empty(2, 40), None)
    tuning = Tuning(lanes=32, split=2, rows=2, depth=3, passes=3, warps=4, min_blocks=4)
    for launch in build_matvec(rows, [product], 2, n_sms=4, arch=90, tuning=tuning):
        device.launch(launch)
    assert {kernel.name for kernel in device.traces} == {"rms_norm", "gemv"}
    assert not device.races()
    for traces in device.traces.values():  # weights and rows are read without waste
        loads = [site for site in traces[0].sites if site.space == "g" and site.kind == "r"]
        assert sum(site.sectors for site in loads) <= 1.1 * sum(site.ideal_sectors for site in loads)


def run_steps(device: TracingDevice, model: Path, kv_dtype: str, prompt: int) -> None:
    """A prompt, steps that decode one and eight sequences, and one of both."""
    pages = prompt // BLOCK + 2
    config = StageConfig(
        n_pages=8 * pages, block_size=BLOCK, max_tokens=max(prompt, 64), max_sequences=8, n_ctx=512, kv_dtype=kv_dtype
    )
    stage = GPUStage(device, optimize(build_graph(GGUFFile.open(model))), config)
    ids, own = list(range(prompt)), [list(range(i * pages, (i + 1) * pages)) for i in range(8)]
    stage.run(make_batch([Piece(ids, own[0])], BLOCK, [prompt - 1]))
    for n in (1, 8):
        stage.run(make_batch([Piece([7], own[i], prompt) for i in range(n)], BLOCK))
    stage.run(make_batch([Piece([7], own[0], prompt + 1), Piece(ids[: prompt // 2], own[1])], BLOCK, [0, prompt // 2]))
    stage.close()


LLAMA = TinyShape(n_layers=1, n_embd=1024, n_ff=1536, n_heads=8, n_kv_heads=2, head_dim=128)
MODELS = [("llama", kind, "f16", LLAMA, False) for kind in KINDS]
MODELS += [("llama", "Q4_K", kv_dtype, LLAMA, True) for kv_dtype in ("q8_0", "bf16", "f32")]
MODELS += [
    (arch, "Q4_K", "f16", TinyShape(n_layers=1, n_embd=512), False) for arch in ("qwen3moe", "qwen2", "gemma3", "qwen3")
]


@pytest.mark.large
@pytest.mark.timeout(3600)  # nearly all of it is g++
@pytest.mark.parametrize("arch, kind, kv_dtype, shape, descending", MODELS)
def test_kernels_of_a_layer(
    tmp_path: Path, arch: str, kind: str, kv_dtype: str, shape: TinyShape, descending: bool
) -> None:
    device = TracingDevice(n_sms=16, transactions=False, descending=descending)
    run_steps(device, write_tiny_model(tmp_path / "model.gguf", arch, kind, shape=shape), kv_dtype, 150)
    assert len(device.traces) >= 10
    assert not device.races()


@pytest.mark.large
@pytest.mark.parametrize(
    "row",
    [
        RowSampling(row=0, temperature=0.8, top_k=40, top_p=0.9, number=0.4, n_logprobs=5),
        RowSampling(row=1, temperature=0.8, top_p=0.9, number=0.7),
        RowSampling(row=0, temperature=1.0, min_p=0.01, number=0.2),
        RowSampling(row=1, temperature=1.0, number=0.9),
    ],
)
def test_sampling(row: RowSampling) -> None:
    device, n = TracingDevice(transactions=False), 5000
    logits = device.array(rng_of("sampling").normal(0, 3, (2, n)).astype(np.float32))
    sampler = DeviceSampler(device, n, 2)
    sampler.fetch(sampler.start(logits, n, [row]))
    assert not device.races()
    device.close()
