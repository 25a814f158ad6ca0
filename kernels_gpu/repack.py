"""From blocks as in the file to packed weights, on the device: launches of `cuda/repack.cu`.

The host only copies the file's bytes. `weights_layout.pack` does the same in NumPy and says what is right; float types, whose
rows stay as they are, go through it.
"""

from __future__ import annotations

from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES, UNIT, WeightLayout

_THREADS = 128


def can_repack(layout: WeightLayout) -> bool:
    """Whether a matrix is of blocks."""
    return layout.kind not in FLOAT_BYTES


def build_repack(target: Buffer, layout: WeightLayout, rows: Buffer, first_row: int, n_rows: int) -> list[Launch]:
    """`rows` holds rows first_row .. first_row + n_rows as in the file. The whole target must have been zero before the first."""
    assert can_repack(layout) and 0 < n_rows <= layout.n_rows - first_row
    return [
        Launch(
            Kernel("repack.cu", "repack", (("TYPE", layout.kind), ("THREADS", _THREADS))),
            grid=(-(-n_rows * (layout.n_columns // UNIT) // _THREADS), 1, 1),
            block=(_THREADS, 1, 1),
            args=(rows, n_rows, layout.n_columns, first_row, layout.n_rows, target),
        )
    ]
