"""Launches of a mixture of experts for few slots: `cuda/experts.cu`, and the kernels of `cuda/gemv.cu` and `gemv_gated.cu` for
experts. Of many slots `expert_tiles` has the products.

A slot is one of the experts of one row: row r has slots r * n_used .. r * n_used + n_used - 1. The matrices of all experts lie
one above the other in one weight. Nothing here needs to know on the host which experts were chosen, so all of it may be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pyinfer.graph.ops import Activation
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.matmul import MAX_MATRICES
from pyinfer.kernels_gpu.matvec import Product, gemv_defines
from pyinfer.kernels_gpu.matvec_gated import GATED_BLOCK, can_fuse_gated, gated_defines
from pyinfer.kernels_gpu.matvec_tuning import Problem, default_tuning, gated_tuning
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES

_SOURCE = "experts.cu"
_WARPS = 4
_MAX_GRID = 65535
Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Slots:
    """The chosen experts of a step."""

    experts: Buffer  # int32 [n_rows, n_used], -1 in rows of padding
    n_rows: int
    n_used: int
    n_experts: int

    @property
    def n(self) -> int:
        return self.n_rows * self.n_used


def build_route(
    experts: Buffer | None, weights: Buffer, logits: Buffer, present: Buffer, n_rows: int, n_used: int, n_experts: int,
    *, normalize: bool, scale: float, scoring: Scoring,
) -> list[Launch]:  # fmt: skip
    """experts int32 and weights float32 [n_rows, n_used] of logits float32 [n_rows, n_experts]; see `graph.ops.RouteExperts`.

    Rows where `present`, int32 [n_rows] on the device, is negative choose none: -1, and 0. Nothing of theirs is computed.
    """
    assert 0 < n_used <= n_experts
    defines = (
        ("N_EXPERTS", n_experts), ("N_USED", n_used), ("SIGMOID", int(scoring == "sigmoid")),
        ("NORMALIZE", int(normalize)), ("WARPS", _WARPS),
    )  # fmt: skip
    return [
        Launch(
            Kernel(_SOURCE, "route_experts", defines),
            grid=(-(-n_rows // _WARPS), 1, 1),
            block=(32 * _WARPS, 1, 1),
            args=(logits, present, n_rows, float(scale), experts, weights),
            overlap=True,
        )
    ]


def build_combine(
    out: Buffer, x: Buffer, weights: Buffer, width: int, n_rows: int, n_used: int, residual: Buffer | None = None
) -> list[Launch]:
    """out float32 [n_rows, width] = residual + the weighted sum of x's slots, float32 [n_rows, n_used * width]; what weighs 0 may
    be anything."""
    assert width % 4 == 0
    threads = min(256, -(-width // 128) * 32)
    defines = (
        ("N_EXPERTS", n_used), ("N_USED", n_used), ("SIGMOID", 0), ("NORMALIZE", 0), ("WARPS", _WARPS), ("WIDTH", width),
        ("THREADS", threads),
    )  # fmt: skip
    return [
        Launch(
            Kernel(_SOURCE, "combine_experts", defines),
            grid=(-(-(width // 4) // threads), n_rows, 1),
            block=(threads, 1, 1),
            args=(x, weights, residual, out),
            overlap=True,
        )
    ]


def build_expert_matvec(
    x: Operand, products: Sequence[Product], slots: Slots, *, n_sms: int, arch: int
) -> list[Launch]:
    """out [slots, n] of each weight [n_experts * n, columns]: each slot reads its expert's matrix by itself.

    For few slots, and for float32 weights. x is "a8" (block types) or "f32", a row for each token or for each slot.
    """
    launches = []
    for start in range(0, len(products), MAX_MATRICES):
        part = products[start : start + MAX_MATRICES]
        layouts = [product.weight.layout for product in part]
        columns, rows = layouts[0].n_columns, [layout.n_rows // slots.n_experts for layout in layouts]
        kinds = tuple(layout.kind for layout in layouts)
        assert all((kind in FLOAT_BYTES) == (x.form == "f32") for kind in kinds), (x.form, kinds)
        # as for one token: the order of sums must not depend on how many there are
        cut = default_tuning(Problem(kinds, sum(rows) * slots.n_used, columns, 1), n_sms, arch)
        defines = (*gemv_defines(Problem(kinds, sum(rows), columns, 1), cut), ("EXPERTS", slots.n_experts))
        blocks = [cut.n_blocks(n) for n in rows]
        matrices: list[tuple[Buffer | None, Buffer | None, int, int]]
        matrices = [(p.weight.buffer, p.out, n, b) for p, n, b in zip(part, rows, blocks, strict=True)]
        matrices += [(None, None, 0, 0)] * (MAX_MATRICES - len(part))
        for first in range(0, slots.n, _MAX_GRID):
            launches.append(
                Launch(
                    Kernel("gemv.cu", "gemv_experts", defines),
                    grid=(sum(blocks), min(_MAX_GRID, slots.n - first), 1),
                    block=(32 * cut.warps, 1, 1),
                    args=(
                        x.data, x.scales, x.sums, slots.experts, first, slots_of_row(x, columns, slots),
                        *(field for matrix in matrices for field in matrix),
                    ),
                    overlap=True,
                )
            )  # fmt: skip
    return launches


def can_fuse_gated_experts(gate: DeviceWeight, up: DeviceWeight, n_experts: int) -> bool:
    """Whether `build_gated_expert_matvec` takes these matrices: as `can_fuse_gated`, each expert's by itself."""
    return can_fuse_gated(gate, up) and gate.layout.n_rows // n_experts % GATED_BLOCK == 0


def build_gated_expert_matvec(
    out: Operand, x: Operand, gate: DeviceWeight, up: DeviceWeight, activation: Activation, slots: Slots,
    *, n_sms: int, arch: int,
) -> list[Launch]:  # fmt: skip
    """out [slots, n] = activation(x @ gate.T) * (x @ up.T), "f32" or "a8", of each slot's matrices; x as above."""
    kind, columns, n = gate.layout.kind, gate.layout.n_columns, gate.layout.n_rows // slots.n_experts
    assert can_fuse_gated_experts(gate, up, slots.n_experts) and out.form in ("f32", "a8") and slots.n <= _MAX_GRID
    assert (kind in FLOAT_BYTES) == (x.form == "f32") and out.width == slots.n_used * n
    cut = gated_tuning(Problem((kind, kind), 2 * n * slots.n_used, columns, 1), n_sms, arch)
    defines = gated_defines(Problem((kind, kind), 2 * n, columns, 1), cut, activation, out)
    return [
        Launch(
            Kernel("gemv_gated.cu", "gemv_gated_experts", (*defines, ("EXPERTS", slots.n_experts))),
            grid=(n // GATED_BLOCK, slots.n, 1),
            block=(32 * cut.warps, 1, 1),
            args=(
                x.data, x.scales, x.sums, slots.experts, slots_of_row(x, columns, slots), gate.buffer, up.buffer, n,
                out.data, out.scales, out.sums,
            ),
            overlap=True,
        )
    ]  # fmt: skip


def slots_of_row(x: Operand, columns: int, slots: Slots) -> int:
    """How many slots share a row of x: all of a token, or none."""
    assert x.width in (columns, columns * slots.n_used), (x.width, columns, slots.n_used)
    return slots.n_used if x.width == columns else 1
