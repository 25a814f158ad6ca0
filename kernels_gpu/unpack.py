"""Packed weights as numbers: rows of an embedding table (`embed.cu`), whole matrices as float16 (`dequant.cu`)."""

from __future__ import annotations

from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.matvec_tuning import step_columns
from pyinfer.kernels_gpu.weights import DeviceWeight

_WARPS = 8


def build_embed(out: Buffer, table: DeviceWeight, ids: Buffer, scale: float, n_rows: int) -> list[Launch]:
    """out float32 [n_rows, columns] = table[ids] * scale; ids int32 [n_rows] on the device, a negative one gives zeros."""
    layout = table.layout
    steps = -(-layout.n_columns // step_columns(layout.kind))
    threads = min(128, -(-steps // 32) * 32)
    defines = (("TYPE", layout.kind), ("THREADS", threads), ("RAGGED", int(layout.n_columns % 4 != 0)))
    return [
        Launch(
            Kernel("embed.cu", "embed", defines),
            grid=(-(-steps // threads), n_rows, 1),
            block=(threads, 1, 1),
            args=(table.buffer, layout.n_rows, layout.n_columns, ids, float(scale), out),
            overlap=True,
        )
    ]


def build_dequantize(
    out: Buffer, weight: DeviceWeight, first_row: int = 0, n_rows: int | None = None, gain: float = 1.0
) -> list[Launch]:
    """out float16 [n_rows, columns] = gain * those rows of the weight, to its last one without `n_rows`."""
    layout = weight.layout
    rows = layout.n_rows - first_row if n_rows is None else n_rows
    assert 0 < rows <= layout.n_rows - first_row
    steps = rows * -(-layout.n_columns // step_columns(layout.kind))
    return [
        Launch(
            Kernel("dequant.cu", "dequantize", (("TYPE", layout.kind), ("WARPS", _WARPS))),
            grid=(-(-steps // (32 * _WARPS)), 1, 1),
            block=(32 * _WARPS, 1, 1),
            args=(weight.buffer, layout.n_rows, layout.n_columns, first_row, rows, float(gain), out),
            overlap=True,
        )
    ]
