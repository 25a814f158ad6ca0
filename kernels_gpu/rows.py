"""Launches of `rows.cu`: norms, gated activations, sums, selected rows, and the forms that matmuls read."""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.graph.ops import Activation
from pyinfer.kernels_gpu.launch import Buffer, Defines, Dim3, Kernel, Launch
from pyinfer.kernels_gpu.operand import A8Rows, F32Rows, Form, H16Rows, Operand

_SOURCE = "rows.cu"
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
_FORMS: dict[Form, int] = {"f32": 0, "a8": 1, "h16": 2}
_FEW_ROWS = 16  # below, a row's latency counts and it gets many threads


@dataclass(frozen=True, slots=True)
class BeforeNorm:
    """What happens to x before an RMSNorm: x + residual is kept in `sum`; with a weight x is normalized before that."""

    residual: F32Rows
    sum: F32Rows  # may be `residual`
    weight: Buffer | None = None
    eps: float = 0.0


def output_define(out: Operand) -> tuple[str, int]:
    """The form of an output as `row_output.cuh` takes it."""
    return "OUT", _FORMS[out.form]


def output_args(out: Operand) -> tuple[Buffer | None, Buffer | None, Buffer | None]:
    """The three pointers of an output: data, scales, sums."""
    match out:
        case F32Rows():
            return out.data, None, None
        case A8Rows():
            return out.codes, out.scales, out.sums
        case H16Rows():
            return out.data, out.scales, None


def build_rms_norm(
    out: Operand, x: F32Rows, weight: Buffer, eps: float, before: BeforeNorm | None = None
) -> list[Launch]:
    """out = x / sqrt(mean(x^2) + eps) * weight, over whole rows, in one kernel with what may come before."""
    kind = 0 if before is None else 1 if before.weight is None else 2
    threads = _threads(out)
    return [
        Launch(
            Kernel(_SOURCE, "rms_norm", (*_defines(out, threads), ("BEFORE", kind))),
            grid=(out.n_rows, 1, 1),
            block=(threads, 1, 1),
            args=(
                x.data, weight, float(eps), before.weight if before else None, float(before.eps) if before else 0.0,
                before.residual.data if before else None, before.sum.data if before else None, *output_args(out),
            ),
            overlap=True,
        )
    ]  # fmt: skip


def build_head_norm(out: F32Rows, x: F32Rows, weight: Buffer, head: int, eps: float) -> list[Launch]:
    """RMSNorm of each `head` columns by itself; `out` may be x."""
    n_heads = x.width // head
    warps = min(8, n_heads)
    return [
        Launch(
            Kernel(_SOURCE, "head_norm", (*_defines(out, 32 * warps), ("BEFORE", 0), ("HEAD", head))),
            grid=(-(-n_heads // warps), x.n_rows, 1),
            block=(32 * warps, 1, 1),
            args=(x.data, weight, float(eps), out.data),
            overlap=True,
        )
    ]


def build_gated(out: Operand, gate: F32Rows, up: F32Rows, activation: Activation) -> list[Launch]:
    """out = activation(gate) * up."""
    return _map("gated", out, (gate.data, up.data), (("ACTIVATION", _ACTIVATIONS[activation]),))


def build_add(out: Operand, a: F32Rows, b: F32Rows) -> list[Launch]:
    """out = a + b; as float32, `out` may be one of them."""
    return _map("add", out, (a.data, b.data))


def build_quantize(out: Operand, x: F32Rows) -> list[Launch]:
    """out = x in another form."""
    return _map("copy_rows", out, (x.data, None))


def build_select_rows(out: Operand, x: F32Rows, rows: Buffer) -> list[Launch]:
    """out[m] = x[rows[m]]; `rows` is int32 [out.n_rows] on the device, a negative one gives zeros."""
    return _map("copy_rows", out, (x.data, rows))


def _map(name: str, out: Operand, args: tuple[Buffer | None, ...], defines: Defines = ()) -> list[Launch]:
    """A kernel that computes each column by itself: blocks share a row, but for "h16", which needs its maximum."""
    whole = out.form == "h16"
    threads = _threads(out) if whole else min(256, 32 * _warps(out))
    grid: Dim3 = (1 if whole else -(-(out.width // 4) // threads), out.n_rows, 1)
    return [
        Launch(
            Kernel(_SOURCE, name, (*_defines(out, threads), ("BEFORE", 0), *defines)),
            grid=grid,
            block=(threads, 1, 1),
            args=(*args, *output_args(out)),
            overlap=True,
        )
    ]


def _defines(out: Operand, threads: int) -> Defines:
    assert out.width % (32 if out.form == "a8" else 4) == 0, f"rows of {out.width} columns as {out.form}"
    return ("WIDTH", out.width), ("THREADS", threads), output_define(out)


def _threads(out: Operand) -> int:
    """Threads of a block that takes a whole row, four columns each at a time: all at once for few rows, in turns for many,
    where several blocks share a multiprocessor."""
    warps = _warps(out)
    return 32 * (min(warps, 32) if out.n_rows <= _FEW_ROWS else min(warps, max(8, -(-warps // 8)), 32))


def _warps(out: Operand) -> int:
    """Warps that hold a row at four columns a lane."""
    return -(-out.width // 128)
