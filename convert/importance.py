"""How much an error at each weight counts, as Numba code.

With an importance matrix: the mean square of the column's inputs, times a factor that grows with the weight itself, as
llama.cpp weighs. Without one: by the weight's size above its group's typical one, the magnitude for types with a minimum,
the square for those without, with which Q3_K of trained models came out nearer on average.
"""

from __future__ import annotations

import numpy as np

from pyinfer.convert.jit import compiled


@compiled
def mean_square(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total / np.float32(x.size)


@compiled
def weigh_by_columns(x, columns, typical, w, wx):  # type: ignore[no-untyped-def]
    """Importances w and w * x of weights x; `columns` are those of their inputs, `typical` a mean square of weights."""
    for i in range(x.size):
        w[i] = columns[i] * np.sqrt(typical + x[i] * x[i])
        wx[i] = w[i] * x[i]


@compiled
def weigh_by_size(x, group, squared, w, wx):  # type: ignore[no-untyped-def]
    """Importances w and w * x of weights x in groups of `group`, by their magnitudes or `squared`."""
    for start in range(0, x.size, group):
        total = np.float32(0)
        for i in range(start, start + group):
            total += x[i] * x[i]
        typical = total / np.float32(group)
        for i in range(start, start + group):
            w[i] = typical + x[i] * x[i] if squared else np.sqrt(typical) + abs(x[i])
            wx[i] = w[i] * x[i]


@compiled
def weigh_block(x, columns, start, group, squared, w, wx):  # type: ignore[no-untyped-def]
    """Importances of a super-block x (256,) whose first column is `start`; `columns` is empty without a matrix."""
    if columns.size:
        weigh_by_columns(x, columns[start : start + x.size], np.float32(4) * mean_square(x), w, wx)
    else:
        weigh_by_size(x, group, squared, w, wx)
