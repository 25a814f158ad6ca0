"""Products with 1 to 8 rows of activations, read straight from packed weights: launches of `cuda/gemv.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyinfer.kernels_gpu.launch import Buffer, Defines, Kernel, Launch
from pyinfer.kernels_gpu.matvec_tuning import MAX_TOKENS, STATIC_SHARED_BYTES, Problem, Tuning, tuning_of
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES

MAX_MATRICES = 3  # of one launch
_NORM_COLUMNS = 4096  # at most, which a block holds in registers


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of a product: out = x @ weight.T + bias."""

    weight: DeviceWeight
    out: Buffer  # float32 [n_rows, rows of the weight]
    bias: Buffer | None = None  # float32 [rows of the weight]


@dataclass(frozen=True, slots=True)
class RowNorm:
    """An RMSNorm of a single row, which every block of the product does for itself."""

    weight: Buffer  # float32 [columns]
    eps: float


def can_fuse_norm(problem: Problem, cut: Tuning) -> bool:
    """Whether the row fits beside a ring of tiles, without which registers would not do."""
    row_bytes = problem.n_columns * 5 // 4 + 1024  # codes, scales and sums, with something to spare
    fits = problem.n_columns <= _NORM_COLUMNS and cut.shared_bytes(problem) + row_bytes <= STATIC_SHARED_BYTES
    return problem.n_tokens == 1 and cut.depth > 1 and fits and not any(kind in FLOAT_BYTES for kind in problem.kinds)


def normed_cut(cut: Tuning, n_columns: int) -> Tuning:
    """The same with registers for a row and the norm's weights, four of each a lane and turn of the block."""
    turns = -(-n_columns // (128 * cut.warps))
    return replace(cut, min_blocks=min(cut.min_blocks, 65536 // (32 * cut.warps * (56 + 8 * turns))))


def takes_norm(weights: Sequence[DeviceWeight], n_sms: int, arch: int) -> bool:
    """Whether `build_matvec` takes a norm for one row with these matrices."""
    products = [Product(weight, weight.buffer) for weight in weights]
    problems = [problem_of(products[i : i + MAX_MATRICES], 1) for i in range(0, len(products), MAX_MATRICES)]
    return all(can_fuse_norm(problem, tuning_of(problem, n_sms, arch)) for problem in problems)


def build_matvec(
    x: Operand,
    products: Sequence[Product],
    n_rows: int,
    *,
    n_sms: int,
    arch: int,
    residual: Buffer | None = None,
    norm: RowNorm | None = None,
    tuning: Tuning | None = None,
) -> list[Launch]:
    """Launches for matrices that read the same x, "a8" for block types and "f32" for float types, of 1 to 8 rows.

    `residual`, float32 like the only out, is added; it may be that out. With a `norm` x is one "f32" row, and norm(x) as "a8"
    is multiplied. A row's result does not depend on n_rows. `tuning` stands in for what `matvec_tuning` would choose.
    """
    assert 1 <= n_rows <= MAX_TOKENS, n_rows
    assert residual is None or len(products) == 1
    launches = []
    for first in range(0, len(products), MAX_MATRICES):
        part = products[first : first + MAX_MATRICES]
        problem = problem_of(part, n_rows)
        cut = tuning or tuning_of(problem, n_sms, arch)
        cut = normed_cut(cut, problem.n_columns) if norm else cut
        launches.append(_launch(x, part, problem, cut, residual, norm))
    return launches


def problem_of(products: Sequence[Product], n_rows: int) -> Problem:
    """What a tuning is chosen for."""
    layouts = [product.weight.layout for product in products]
    kinds = tuple(layout.kind for layout in layouts)
    return Problem(kinds, sum(layout.n_rows for layout in layouts), layouts[0].n_columns, n_rows)


def _launch(
    x: Operand,
    products: Sequence[Product],
    problem: Problem,
    cut: Tuning,
    residual: Buffer | None,
    norm: RowNorm | None,
) -> Launch:
    layouts = [product.weight.layout for product in products]
    assert all(layout.n_columns == x.width for layout in layouts), problem
    form = "a8" if norm else x.form
    assert norm is None or (x.form == "f32" and can_fuse_norm(problem, cut)), problem
    assert all((layout.kind in FLOAT_BYTES) == (form == "f32") for layout in layouts), (x.form, problem)
    matrices: list[tuple[Buffer | None, Buffer | None, Buffer | None, int, int]]
    blocks = [cut.n_blocks(layout.n_rows) for layout in layouts]
    matrices = [
        (p.weight.buffer, p.out, p.bias, p.weight.layout.n_rows, n) for p, n in zip(products, blocks, strict=True)
    ]
    matrices += [(None, None, None, 0, 0)] * (MAX_MATRICES - len(products))
    return Launch(
        Kernel("gemv.cu", "gemv", (*gemv_defines(problem, cut), *norm_define(norm))),
        grid=(sum(blocks), 1, 1),
        block=(32 * cut.warps, 1, 1),
        args=(
            x.data, x.scales, x.sums, residual, *(value for matrix in matrices for value in matrix),
            norm.weight if norm else None, norm.eps if norm else 0.0,
        ),
        overlap=True,
    )  # fmt: skip


def gemv_kernel(problem: Problem, cut: Tuning) -> Kernel:
    """The variant of the kernel; numbers of rows are arguments, so that few variants serve a model."""
    return Kernel("gemv.cu", "gemv", gemv_defines(problem, cut))


def norm_define(norm: RowNorm | None) -> Defines:
    return (("NORM", 1),) if norm else ()


def gemv_defines(problem: Problem, cut: Tuning) -> Defines:
    kinds = (*problem.kinds, *[problem.kinds[0]] * (MAX_MATRICES - len(problem.kinds)))
    return (
        *((f"TYPE{i}", kind) for i, kind in enumerate(kinds)),
        ("SEGMENTS", len(problem.kinds)), ("TOKENS", problem.n_tokens), ("ROWS", cut.rows), ("LANES", cut.lanes),
        ("SPLIT", cut.split), ("WARPS", cut.warps), ("DEPTH", cut.depth),
        ("MIN_BLOCKS", cut.min_blocks), ("COLUMNS", problem.n_columns),
    )  # fmt: skip
