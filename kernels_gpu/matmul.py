"""Products with many rows of activations: launches of `cuda/matmul_mma.cu`, or weights made float16 and cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.mma_tiling import FLOAT_KINDS, GPU, Tiling, tilings
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.weights_layout import WeightLayout

MAX_MATRICES = 3  # of one launch


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of a product: out = x @ weight.T + bias."""

    layout: WeightLayout
    weight: Buffer
    out: Buffer  # float32 [m, rows of the weight]
    bias: Buffer | None = None  # float32 [rows of the weight]
    expanded: Buffer | None = None  # the same matrix in float16 [rows, columns], where a copy is kept


@dataclass(frozen=True, slots=True)
class MmaWorkspace:
    """Where blocks that share a tile meet; one pair serves all launches, because they come one after another."""

    partials: Buffer
    arrivals: Buffer  # int32, zero before the first launch; every launch leaves zeros


def build_mma(
    x: Operand,
    products: Sequence[Product],
    m: int,
    workspace: MmaWorkspace,
    gpu: GPU,
    *,
    residual: Buffer | None = None,
    tiling: Tiling | None = None,
    overlap: bool = False,
) -> list[Launch]:
    """Launches for matrices of one type and one number of columns (a multiple of 8) that read the same x."""
    kind, columns = products[0].layout.kind, products[0].layout.n_columns
    assert x.form == "h16" and x.width == columns and columns % 8 == 0
    assert all((p.layout.kind, p.layout.n_columns) == (kind, columns) for p in products)
    assert residual is None or len(products) == 1
    launches = []
    for first in range(0, len(products), MAX_MATRICES):
        part = products[first : first + MAX_MATRICES]
        widths = tuple(p.layout.n_rows for p in part)
        cut = tiling or tilings(kind, m, widths, columns, gpu)[0]
        n_blocks = cut.n_blocks(m, widths, columns)
        assert n_blocks * cut.partial_bytes <= workspace.partials.n_bytes
        assert cut.n_tiles(m, widths) * 4 <= workspace.arrivals.n_bytes
        launches.append(
            Launch(
                mma_kernel(kind, len(part), cut),
                grid=(n_blocks, 1, 1),
                block=(cut.warps * 32, 1, 1),
                args=(
                    x.data, x.scales, residual, workspace.partials, workspace.arrivals, m, columns,
                    cut.n_units(m, widths, columns), cut.units_per_block,
                    *(field for p in part for field in (p.weight, p.out, p.bias, p.layout.n_rows)),
                ),
                shared_bytes=cut.shared_bytes(kind),
                overlap=overlap,
            )
        )  # fmt: skip
    return launches


def mma_kernel(kind: str, n_matrices: int, cut: Tiling) -> Kernel:
    """The variant of the kernel; shapes are arguments, so that few variants serve a model."""
    return Kernel(
        "matmul_mma.cu",
        "matmul_mma",
        (
            ("TYPE", kind),
            ("SEGMENTS", n_matrices),
            ("BM", cut.rows),
            ("MT", cut.fragments),
            ("WARPS", cut.warps),
            ("KX", cut.x_columns),
            ("W_STAGES", cut.w_stages),
            ("X_STAGES", cut.x_stages),
            ("BLOCKS_PER_SM", cut.blocks),
            *(() if kind in FLOAT_KINDS else (("UNITS", cut.chunk_units),)),
        ),
    )
