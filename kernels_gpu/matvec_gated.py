"""The first half of a gated feed-forward layer for 1 to 8 rows in one launch: `cuda/gemv_gated.cu`."""

from __future__ import annotations

from pyinfer.graph.ops import Activation
from pyinfer.kernels_gpu.launch import Defines, Kernel, Launch
from pyinfer.kernels_gpu.matvec import RowNorm, can_fuse_norm, norm_define, normed_cut
from pyinfer.kernels_gpu.matvec_tuning import MAX_TOKENS, Problem, Tuning, gated_tuning_of
from pyinfer.kernels_gpu.operand import FORMS, Operand
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES

_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
GATED_BLOCK = 32  # columns of the result


def can_fuse_gated(gate: DeviceWeight, up: DeviceWeight) -> bool:
    """Whether `build_gated_matvec` takes these matrices: of one type and shape, rows in whole blocks of "a8"."""
    same = (gate.layout.kind, gate.layout.n_rows, gate.layout.n_columns)
    return same == (up.layout.kind, up.layout.n_rows, up.layout.n_columns) and gate.layout.n_rows % GATED_BLOCK == 0


def gated_takes_norm(gate: DeviceWeight, n_sms: int, arch: int) -> bool:
    """Whether `build_gated_matvec` takes a norm for one row with such matrices."""
    problem = gated_problem(gate, 1)
    return can_fuse_norm(problem, gated_tuning_of(problem, n_sms, arch))


def build_gated_matvec(
    out: Operand,
    x: Operand,
    gate: DeviceWeight,
    up: DeviceWeight,
    activation: Activation,
    n_rows: int,
    *,
    n_sms: int,
    arch: int,
    norm: RowNorm | None = None,
    tuning: Tuning | None = None,
) -> list[Launch]:
    """out = activation(x @ gate.T) * (x @ up.T), "f32" or "a8"; x and norm as `build_matvec` takes them, of 1 to 8 rows.

    The numbers are those of `build_matvec` and `build_gated`, bit for bit, where the former does not split rows over warps.
    """
    layout = gate.layout
    assert can_fuse_gated(gate, up) and 1 <= n_rows <= MAX_TOKENS and out.form in ("f32", "a8")
    problem = gated_problem(gate, n_rows)
    cut = tuning or gated_tuning_of(problem, n_sms, arch)
    cut = normed_cut(cut, problem.n_columns) if norm else cut
    form = "a8" if norm else x.form
    assert norm is None or (x.form == "f32" and can_fuse_norm(problem, cut)), problem
    assert (
        x.width == layout.n_columns and (layout.kind in FLOAT_BYTES) == (form == "f32") and out.width == layout.n_rows
    )
    defines = (*gated_defines(problem, cut, activation, out), *norm_define(norm))
    return [
        Launch(
            Kernel("gemv_gated.cu", "gemv_gated", defines),
            grid=(layout.n_rows // GATED_BLOCK, 1, 1),
            block=(32 * cut.warps, 1, 1),
            args=(
                x.data, x.scales, x.sums, gate.buffer, up.buffer, layout.n_rows, out.data, out.scales, out.sums,
                norm.weight if norm else None, norm.eps if norm else 0.0,
            ),
            overlap=True,
        )
    ]  # fmt: skip


def gated_problem(gate: DeviceWeight, n_rows: int) -> Problem:
    """What a tuning is chosen for."""
    kind = gate.layout.kind
    return Problem((kind, kind), 2 * gate.layout.n_rows, gate.layout.n_columns, n_rows)


def gated_defines(problem: Problem, cut: Tuning, activation: Activation, out: Operand) -> Defines:
    """As the kernels take them."""
    kind = problem.kinds[0]
    return (
        ("TYPE", kind), ("ACTIVATION", _ACTIVATIONS[activation]), ("OUT", FORMS.index(out.form)), ("TOKENS", problem.n_tokens),
        ("ROWS", cut.rows), ("LANES", cut.lanes), ("WARPS", cut.warps), ("DEPTH", cut.depth),
        ("MIN_BLOCKS", cut.min_blocks), ("COLUMNS", problem.n_columns),
    )  # fmt: skip
