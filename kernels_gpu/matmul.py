"""Products with many rows of activations: launches of `cuda/matmul_mma.cu`, or weights made float16 and cuBLAS.

Rows of x come as "h16". Which of both is used is a `Route` (`matmul_route`). The second goes by slices of weight rows that are
made float16, multiplied and finished one after another in the same scratch memory: it stays in the L2, so that what travels
to device memory is the packed weights and the results. Where a float16 copy of a matrix is kept (`expand`), or the file has
float16, that is multiplied instead. All rows of a step share what was made float16: a prompt that comes in larger steps
pays for it less often (7e9 weights of Llama-3.1-8B, by an H200's bandwidth: 1.5 ms if it stays in the L2, else 4.2).
Float32 weights are always cuBLAS's, with float32 rows and float32 products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pyinfer.kernels_gpu.launch import Buffer, Gemm, GemmType, Kernel, Launch, Step
from pyinfer.kernels_gpu.matmul_route import Problem, Route
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.mma_tiling import GPU, Tiling, tilings
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.unpack import build_dequantize
from pyinfer.kernels_gpu.weights import DeviceWeight

MAX_MATRICES = 3  # of one launch of matmul_mma
_NO_MATRIX = (None, None, None, 0)
_FINISH_THREADS = 128
# what weights are multiplied with before they become float16, which below 6e-5 would lose digits
_GAINS = {"F32": 1.0, "F16": 1.0, "BF16": 1.0}
_BLOCK_GAIN = 64.0


@dataclass(frozen=True, slots=True)
class MatmulMemory:
    """What products need beside their operands; one serves all, because they come one after another."""

    scratch: Buffer  # `scratch_bytes`
    arrivals: Buffer  # int32, `arrival_bytes`, zero before the first launch; every launch leaves zeros
    copies: Mapping[int, Buffer]  # address of a packed matrix -> its kept copy, float16 [rows, columns]


def build_matmul(
    x: Operand,
    problem: Problem,
    products: Sequence[Product],
    route: Route,
    memory: MatmulMemory,
    gpu: GPU,
    *,
    residual: Buffer | None = None,
    halves: bool = False,
) -> list[Step]:
    """One of `problems_of` by its route. `residual` is added to the only out, which it may be. With `halves` the outs are
    float16, which cuBLAS alone can write."""
    if route.slice_rows:
        return build_gemm(x, problem, products, memory, route.slice_rows, residual=residual, halves=halves)
    assert not halves
    return build_mma(x, problem, products, memory, tiling_of(problem, route, gpu), residual=residual)


def problems_of(products: Sequence[Product], m: int) -> list[tuple[Problem, list[Product]]]:
    """Products of one x in groups that one launch can do: of one type, at most three."""
    groups = []
    for kind, same in groupby(sorted(products, key=_kind), key=_kind):
        members = list(same)
        for first in range(0, len(members), MAX_MATRICES):
            part = members[first : first + MAX_MATRICES]
            columns = part[0].weight.layout.n_columns
            widths = tuple(product.weight.layout.n_rows for product in part)
            groups.append((Problem(kind, m, widths, columns), part))
    return groups


def scratch_bytes(problem: Problem, route: Route, gpu: GPU) -> int:
    if route.slice_rows:
        return _slice_bytes(route.slice_rows, problem) + 4 * problem.m * route.slice_rows
    cut = tiling_of(problem, route, gpu)
    return cut.n_blocks(problem.m, problem.widths, problem.columns) * cut.partial_bytes


def arrival_bytes(problem: Problem, route: Route, gpu: GPU) -> int:
    return 4 if route.slice_rows else 4 * tiling_of(problem, route, gpu).n_tiles(problem.m, problem.widths)


def tiling_of(problem: Problem, route: Route, gpu: GPU) -> Tiling:
    return route.tiling or tilings(problem.kind, problem.m, problem.widths, problem.columns, gpu)[0]


def build_mma(
    x: Operand,
    problem: Problem,
    products: Sequence[Product],
    memory: MatmulMemory,
    cut: Tiling,
    *,
    residual: Buffer | None = None,
) -> list[Step]:
    """One launch of `matmul_mma`; rows of x must be multiples of 16 bytes."""
    assert x.form == "h16" and x.width == problem.columns and problem.columns % 8 == 0
    assert residual is None or len(products) == 1
    n_blocks = cut.n_blocks(problem.m, problem.widths, problem.columns)
    assert n_blocks * cut.partial_bytes <= memory.scratch.n_bytes
    assert cut.n_tiles(problem.m, problem.widths) * 4 <= memory.arrivals.n_bytes
    matrices = (*((p.weight.buffer, p.out, p.bias, p.weight.layout.n_rows) for p in products), *[_NO_MATRIX] * 2)
    return [
        Launch(
            mma_kernel(problem.kind, cut),
            grid=(n_blocks, 1, 1),
            block=(cut.warps * 32, 1, 1),
            args=(
                x.data, x.scales, float(x.factor), residual, memory.scratch, memory.arrivals, problem.m, problem.columns,
                cut.n_units(problem.m, problem.widths, problem.columns), cut.units_per_block,
                *(field for matrix in matrices[:MAX_MATRICES] for field in matrix),
            ),
            shared_bytes=cut.shared_bytes(problem.kind),
            overlap=True,
        )
    ]  # fmt: skip


def mma_kernel(kind: str, cut: Tiling) -> Kernel:
    """The variant of the kernel."""
    return Kernel("matmul_mma.cu", "matmul_mma", cut.defines(kind))


def build_gemm(
    x: Operand,
    problem: Problem,
    products: Sequence[Product],
    memory: MatmulMemory,
    slice_rows: int,
    *,
    residual: Buffer | None = None,
    halves: bool = False,
) -> list[Step]:
    """cuBLAS on `slice_rows` weight rows at a time; float32 weights with float32 rows, as they lie. With `halves` the outs are
    float16, which x without scales and bounded products allow (`bounds`)."""
    assert x.form == ("f32" if problem.kind == "F32" else "h16") and x.width == problem.columns
    assert residual is None or len(products) == 1
    assert not halves or (x.scales is None and residual is None and not any(product.bias for product in products))
    steps: list[Step] = []
    for product in products:
        for first in range(0, product.weight.layout.n_rows, slice_rows):
            n = min(slice_rows, product.weight.layout.n_rows - first)
            steps.extend(_slice(x, problem, product, memory, first, n, residual, halves))
    return steps


def _slice(
    x: Operand, problem: Problem, product: Product, memory: MatmulMemory, first: int, n: int, residual: Buffer | None,
    halves: bool,
) -> Iterator[Step]:  # fmt: skip
    m, columns, width = problem.m, problem.columns, product.weight.layout.n_rows
    kind: GemmType = "f32" if problem.kind == "F32" else "f16"
    gain, stride = gain_of(problem.kind), columns
    weights = float16_of(product.weight, memory.copies)
    if kind == "f32":
        row_bytes = product.weight.layout.parts[0].row_bytes
        weights, stride = product.weight.buffer.at(row_bytes * first, row_bytes * n), row_bytes // 4
    elif weights is not None:
        weights = weights.at(2 * first * columns, 2 * n * columns)
    else:
        weights = memory.scratch.at(0, 2 * n * columns)
        yield from build_dequantize(weights, product.weight, first, n, gain)
    out, bias = product.out.at((2 if halves else 4) * first), product.bias.at(4 * first) if product.bias else None
    adds = residual is not None and residual.ptr == product.out.ptr
    if x.scales is None and bias is None and (residual is None or adds):
        yield Gemm(
            out, x.data, weights, m, n, columns, width,
            accumulate=adds, alpha=x.factor / gain, kind=kind, w_stride=stride, halves=halves,
        )  # fmt: skip
        return
    result = memory.scratch.at(_slice_bytes(n, problem), 4 * m * n)
    yield Gemm(result, x.data, weights, m, n, columns, n, kind=kind, w_stride=stride)
    yield Launch(
        Kernel("matmul_finish.cu", "matmul_finish", (("THREADS", _FINISH_THREADS),)),
        grid=(-(-n // (4 * _FINISH_THREADS)), m, 1),
        block=(_FINISH_THREADS, 1, 1),
        args=(
            out, width, result, n, x.scales, x.factor / gain, bias, residual.at(4 * first) if residual else None, n,
        ),
        overlap=True,
    )  # fmt: skip


def gain_of(kind: str) -> float:
    """What a matrix of this type is multiplied with on its way to float16."""
    return _GAINS.get(kind, _BLOCK_GAIN)


def is_float16(products: Sequence[Product], copies: Mapping[int, Buffer]) -> bool:
    """Whether cuBLAS can read all of them as they lie in memory."""
    return all(float16_of(product.weight, copies) is not None for product in products)


def float16_of(weight: DeviceWeight, copies: Mapping[int, Buffer]) -> Buffer | None:
    """The matrix as cuBLAS can read it, where it lies in memory like that: a kept copy, or float16 as in the file."""
    layout = weight.layout
    if layout.kind == "F16" and layout.parts[0].row_bytes == 2 * layout.n_columns:
        return weight.buffer
    return copies.get(weight.buffer.ptr)


def _slice_bytes(n: int, problem: Problem) -> int:
    """Of weights that are made float16."""
    return 0 if problem.kind == "F32" else -(-2 * n * problem.columns // 256) * 256


def _kind(product: Product) -> str:
    return product.weight.layout.kind
