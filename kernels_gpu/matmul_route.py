"""Which way a product with many rows goes: packed weights into the tensor cores (`cuda/matmul_mma.cu`), or cuBLAS on float16.

The first reads each weight once for 128 rows and should reach 55 to 60 % of what cuBLAS can (`mma.sync` against wgmma on
sm_90); the second has to make float16 of all weights first. By the model, `default_route`, they meet near 512 rows
of Llama-3.1-8B, where a float16 copy is kept near 100. `RouteTable` holds what was measured at load (`route_measure`), which
wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

from pyinfer.kernels_gpu.mma_tiling import GPU, Tiling, model_cycles, tilings
from pyinfer.kernels_gpu.weights_layout import layout_of

SCRATCH_BYTES = 256 << 20  # most that a slice may take: float16 weights and float32 results
_L2_SHARE = 24 << 20  # of a slice whose weights are still in the L2 when they are multiplied
_GEMM_TILE = (128, 256)  # rows of x, weight rows: what cuBLAS takes where there is enough of both
# cycles and multiprocessor: FLOP with float32 sums that cuBLAS reaches, bytes of device memory and of the L2
_FLOPS_A_CYCLE = {75: 450, 80: 1800, 86: 900, 89: 900, 90: 3300}
_MEMORY_BYTES, _L2_BYTES = 21.0, 40.0
_START_CYCLES = 4000  # of a launch that waits for the one before it


@dataclass(frozen=True, slots=True)
class Problem:
    """A product of m rows with matrices of one type that read the same x."""

    kind: str  # of the weights, as their codec is named
    m: int
    widths: tuple[int, ...]  # rows of each matrix
    columns: int


@dataclass(frozen=True, slots=True)
class Route:
    """0: `matmul_mma`, cut by `tiling` or by default; else cuBLAS on so many weight rows at a time."""

    slice_rows: int = 0
    tiling: Tiling | None = None


@dataclass(slots=True)
class RouteTable:
    """What is known of this GPU; `measured` is filled before programs are lowered.

    `is_float16`: cuBLAS can read the matrices as they lie in memory, so nothing has to be made float16.
    """

    gpu: GPU
    measured: dict[tuple[Problem, bool], Route] = field(default_factory=dict)

    def route(self, problem: Problem, *, is_float16: bool) -> Route:
        return self.measured.get((problem, is_float16)) or default_route(problem, self.gpu, is_float16=is_float16)


@lru_cache(maxsize=4096)
def default_route(problem: Problem, gpu: GPU, *, is_float16: bool) -> Route:
    """The best by the model. Float32 has no kernel of ours for many rows."""
    if problem.kind == "F32":
        return slice_options(problem)[0]
    kind, m, widths, columns = problem.kind, problem.m, problem.widths, problem.columns
    best = tilings(kind, m, widths, columns, gpu)[0]
    mma = model_cycles(best, kind, m, widths, columns, gpu)
    cycles = {
        option: gemm_cycles(problem, option.slice_rows, gpu, is_float16=is_float16) for option in slice_options(problem)
    }
    fastest = min(cycles, key=cycles.__getitem__)
    return fastest if cycles[fastest] < mma else Route()


def tiling_options(problem: Problem, gpu: GPU, most: int) -> list[Route]:
    """The best by the model of each size of tiles and number of warps, best first."""
    best: dict[tuple[int, int, int], Tiling] = {}
    for cut in tilings(problem.kind, problem.m, problem.widths, problem.columns, gpu):
        best.setdefault((cut.rows, cut.fragments, cut.warps), cut)
    return [Route(tiling=cut) for cut in list(best.values())[:most]]


def slice_options(problem: Problem) -> list[Route]:
    """cuBLAS on as much of a matrix as the scratch memory holds, or on slices that stay in the L2; whole tiles of cuBLAS."""
    widest, per_row = max(problem.widths), 2 * problem.columns + 4 * problem.m
    whole = min(widest, max(1, SCRATCH_BYTES // per_row // _GEMM_TILE[1]) * _GEMM_TILE[1])
    small = max(1, _L2_SHARE // (2 * problem.columns) // _GEMM_TILE[1]) * _GEMM_TILE[1]
    return [Route(rows) for rows in dict.fromkeys((whole, min(whole, small)))]


def gemm_cycles(problem: Problem, slice_rows: int, gpu: GPU, *, is_float16: bool) -> float:
    """Clock cycles of the whole product by cuBLAS, all slices after one another."""
    return sum(_slice_cycles(problem, n, gpu, is_float16) for n in _slices(problem, slice_rows))


def _slices(problem: Problem, slice_rows: int) -> Iterator[int]:
    for width in problem.widths:
        for first in range(0, width, slice_rows):
            yield min(slice_rows, width - first)


def _slice_cycles(problem: Problem, n: int, gpu: GPU, is_float16: bool) -> float:
    m, columns = problem.m, problem.columns
    packed = n * columns * sum(part.row_bytes for part in layout_of(problem.kind, 1, 256).parts) / 256
    halves, results = 2 * n * columns, 4 * n * m
    beside = _L2_BYTES if halves + results <= 2 * _L2_SHARE else _MEMORY_BYTES
    unpack = 0.0 if is_float16 else (packed / _MEMORY_BYTES + halves / beside) / gpu.n_sms + _START_CYCLES
    read = halves / (_MEMORY_BYTES if is_float16 else beside) / gpu.n_sms
    flops = _FLOPS_A_CYCLE.get(gpu.arch, 1800)
    waves = ceil(ceil(m / _GEMM_TILE[0]) * ceil(n / _GEMM_TILE[1]) / gpu.n_sms)
    tiled = waves * 2 * _GEMM_TILE[0] * _GEMM_TILE[1] * columns / flops
    least = 2 * max(m, _GEMM_TILE[0] // 2) * n * columns / flops / gpu.n_sms
    multiply = min(tiled, 1.5 * least + _START_CYCLES)  # of few tiles cuBLAS cuts the columns too, which costs some
    return unpack + max(read, multiply, results / _MEMORY_BYTES / gpu.n_sms) + _START_CYCLES
