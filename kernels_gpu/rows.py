"""Launches of `rows.cu` and `ranks.cu`: norms, gated activations, sums, selected rows, and the forms that matmuls read.

Inputs are float32 [n_rows, width].
"""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.graph.ops import Activation
from pyinfer.kernels_gpu.launch import Buffer, Defines, Dim3, Kernel, Launch
from pyinfer.kernels_gpu.operand import FORMS, Operand

_SOURCE = "rows.cu"
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
_FEW_ROWS = 128  # up to here a row has a multiprocessor of its own, and gets many threads


@dataclass(frozen=True, slots=True)
class BeforeNorm:
    """What happens to x before an RMSNorm: x + residual is kept in `sum`; with a weight x is normalized before that.

    With `slot_weights` x has `n_used` slots a row, and residual + their weighted sum is kept (`graph.ops.CombineExperts`).
    """

    residual: Buffer  # float32 [n, width]
    sum: Buffer  # float32 [n, width]; may be `residual`
    weight: Buffer | None = None
    eps: float = 0.0
    slot_weights: Buffer | None = None  # float32 [n, n_used]
    n_used: int = 0

    @property
    def kind(self) -> int:
        """As rows.cu counts them."""
        return 3 if self.slot_weights else 2 if self.weight else 1


def output_define(out: Operand) -> tuple[str, int]:
    """The form of an output as `row_output.cuh` takes it."""
    return "OUT", FORMS.index(out.form)


def build_rms_norm(
    out: Operand, x: Buffer, weight: Buffer, eps: float, n_rows: int, before: BeforeNorm | None = None
) -> list[Launch]:
    """out = x / sqrt(mean(x^2) + eps) * weight, over whole rows, in one kernel with what may come before."""
    kind = before.kind if before else 0
    slots: Defines = (("N_USED", before.n_used),) if before and before.n_used else ()
    threads = _threads(out.width, n_rows)
    return [
        Launch(
            Kernel(_SOURCE, "rms_norm", (*_defines(out, threads), ("BEFORE", kind), *slots)),
            grid=(n_rows, 1, 1),
            block=(threads, 1, 1),
            args=(
                x, weight, float(eps), before.weight if before else None, float(before.eps) if before else 0.0,
                before.slot_weights if before else None, before.residual if before else None, before.sum if before else None,
                out.data, out.scales, out.sums,
            ),
            overlap=True,
        )
    ]  # fmt: skip


def build_head_norm(out: Operand, x: Buffer, weight: Buffer, head: int, eps: float, n_rows: int) -> list[Launch]:
    """RMSNorm of each `head` columns by itself, float32; `out` may be x."""
    n_heads = out.width // head
    warps = min(8, n_heads)
    return [
        Launch(
            Kernel(_SOURCE, "head_norm", (*_defines(out, 32 * warps), ("BEFORE", 0), ("HEAD", head))),
            grid=(-(-n_heads // warps), n_rows, 1),
            block=(32 * warps, 1, 1),
            args=(x, weight, float(eps), out.data),
            overlap=True,
        )
    ]


def build_gated(
    out: Operand, gate: Buffer, up: Buffer, activation: Activation, n_rows: int, *, halves: bool = False
) -> list[Launch]:
    """out = activation(gate) * up, which are float16 with `halves`."""
    defines: Defines = (("ACTIVATION", _ACTIVATIONS[activation]), ("GATED", "__half" if halves else "float"))
    return _map("gated", out, (gate, up, 1.0 / out.factor), n_rows, defines)


def build_add(out: Operand, a: Buffer, b: Buffer, n_rows: int) -> list[Launch]:
    """out = a + b; as float32, `out` may be one of them."""
    return _map("add", out, (a, b), n_rows)


def build_quantize(out: Operand, x: Buffer, n_rows: int) -> list[Launch]:
    """out = x in another form."""
    return _map("copy_rows", out, (x, None), n_rows)


def build_select_rows(out: Operand, x: Buffer, rows: Buffer, n_rows: int) -> list[Launch]:
    """out[m] = x[rows[m]]; `rows` is int32 [n_rows] on the device, a negative one gives zeros."""
    return _map("copy_rows", out, (x, rows), n_rows)


def build_place_columns(out: Buffer, x: Buffer, part: int, first: int, total: int, n_rows: int) -> list[Launch]:
    """out float32 [n_rows, total] = zeros but for `part` columns from `first` on, which are those of x."""
    threads = 256
    return [
        Launch(
            Kernel("ranks.cu", "place_columns", (("THREADS", threads),)),
            grid=(-(-total // threads), n_rows, 1),
            block=(threads, 1, 1),
            args=(x, part, first, total, out),
            overlap=True,
        )
    ]


def _map(
    name: str, out: Operand, args: tuple[Buffer | float | None, ...], n_rows: int, defines: Defines = ()
) -> list[Launch]:
    """A kernel that computes each column by itself: blocks share a row, but for "h16", which needs its maximum."""
    whole = out.form == "h16"
    threads = _threads(out.width, n_rows) if whole else min(256, 32 * _warps(out.width))
    grid: Dim3 = (1 if whole else -(-(out.width // 4) // threads), n_rows, 1)
    return [
        Launch(
            Kernel(_SOURCE, name, (*_defines(out, threads), ("BEFORE", 0), *defines)),
            grid=grid,
            block=(threads, 1, 1),
            args=(*args, out.data, out.scales, out.sums),
            overlap=True,
        )
    ]


def _defines(out: Operand, threads: int) -> Defines:
    assert out.width % (32 if out.form == "a8" else 4) == 0, f"rows of {out.width} columns as {out.form}"
    return ("WIDTH", out.width), ("THREADS", threads), output_define(out)


def _threads(width: int, n_rows: int) -> int:
    """Threads of a block that takes a whole row, four columns each at a time: all at once for few rows, in turns for many,
    where several blocks share a multiprocessor."""
    warps = _warps(width)
    return 32 * (min(warps, 32) if n_rows <= _FEW_ROWS else min(warps, max(8, -(-warps // 8)), 32))


def _warps(width: int) -> int:
    """Warps that hold a row at four columns a lane."""
    return -(-width // 128)
