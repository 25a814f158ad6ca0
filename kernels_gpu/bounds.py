"""How large what comes out of gated feed-forward layers can become, so that float16 is known to hold it.

A row behind an RMSNorm is no longer than sqrt(columns) * the largest weight of the norm, so its product with a matrix is at most
that times the length of the matrix's longest row (Cauchy and Schwarz). Where float16 holds this, and usual numbers are well above
those that lose digits, a prompt's gate and up are float16 and what is made of them needs no factor for each row: half the bytes
between products, and nothing to do behind the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.ops import MatMul
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.fusion import GatedGroup, Group
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.weights import DeviceWeight, DeviceWeights

BOUNDED_ROWS = 256  # of a step: with fewer the weights take most of the time
_LARGEST = 32768.0  # half of what float16 holds, as the factors were rounded
_USUAL = 1e-3  # float16 is then off by 2e-5 of it: numbers below 6e-5 are multiples of 6e-8
_WARPS = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """Euclidean lengths of rows: of the longest, and the quadratic mean."""

    longest: float
    usual: float


def normed_lengths(weight: npt.NDArray[np.float32]) -> Lengths:
    """Of rows behind an RMSNorm with this weight."""
    return Lengths(math.sqrt(weight.size) * float(np.abs(weight).max()), float(np.linalg.norm(weight)))


def float16_factor(x: Lengths | None, gate: Lengths | None, up: Lengths | None, columns: int) -> float | None:
    """By which power of two activation(x @ gate.T) * (x @ up.T) is to be divided so that it fits, as both products do without
    one; None if it is not known to. SiLU and GELU enlarge nothing, and halve what is small. How usual numbers come out is known
    if x has nothing to do with the weights; without lengths nothing is."""
    if x is None or gate is None or up is None:
        return None
    g, u = x.longest * gate.longest, x.longest * up.longest
    if not (g <= _LARGEST and u <= _LARGEST):  # NaN does not fit either
        return None
    factor = 2.0 ** max(0, math.ceil(math.log2(max(g * u, 1.0) / _LARGEST)))
    usual_g, usual_u = x.usual * gate.usual / math.sqrt(columns), x.usual * up.usual / math.sqrt(columns)
    return factor if min(usual_g, usual_u, usual_g * usual_u / 4 / factor) >= _USUAL else None


def lengths_of_gates(device: Device, groups: Iterable[Group], weights: DeviceWeights) -> dict[int, Lengths]:
    """Of the rows of each matrix for gate and up, by its address."""
    matrices: dict[int, DeviceWeight] = {}
    for group in groups:
        if isinstance(group, GatedGroup) and isinstance(group.matmul, MatMul):
            matrices |= {weight.buffer.ptr: weight for weight in map(weights.__getitem__, group.matmul.weights)}
    most = max((weight.layout.n_rows for weight in matrices.values()), default=1)
    squares, found = np.empty(most, np.float32), dict[int, Lengths]()
    buffer = device.alloc(squares.nbytes)
    for address, weight in matrices.items():
        rows = squares[: weight.layout.n_rows]
        device.launch(build_row_squares(buffer, weight))
        device.download(buffer, rows)
        device.synchronize()
        found[address] = Lengths(math.sqrt(float(rows.max())), math.sqrt(float(rows.mean())))
    return found


def build_row_squares(out: Buffer, weight: DeviceWeight) -> Launch:
    """out float32 [n_rows] = the sum of each row's squares."""
    layout = weight.layout
    return Launch(
        Kernel("row_squares.cu", "row_squares", (("TYPE", layout.kind), ("WARPS", _WARPS))),
        grid=(-(-layout.n_rows // _WARPS), 1, 1),
        block=(32 * _WARPS, 1, 1),
        args=(weight.buffer, layout.n_rows, layout.n_columns, out),
        overlap=True,
    )
