"""Matrices and rows of activations on a device, with the numbers that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_emulator.device import EmulatedDevice

from pyinfer.graph.activation import quantize_activation
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import layout_of, pack
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

F32 = npt.NDArray[np.float32]


def upload(device: EmulatedDevice, kind: str, data: npt.NDArray[np.uint8], columns: int) -> DeviceWeight:
    """Rows of a GGUF tensor, uint8 [rows, row bytes], packed."""
    layout = layout_of(kind, len(data), columns)
    weight = DeviceWeight(layout, device.alloc(layout.n_bytes))
    for offset, piece in pack(QuantTensor("w", codec_by_name(kind), (len(data), columns), data)):
        device.upload(weight.buffer, piece, offset)
    return weight


def operand(device: EmulatedDevice, x: F32, form: str) -> tuple[Operand, npt.NDArray[np.float64]]:
    """Rows as "f32" or "a8", and the numbers that they stand for."""
    if form == "f32":
        return Operand("f32", x.shape[1], device.array(x)), x.astype(np.float64)
    a = quantize_activation(x)
    sums = a.scales * a.codes.reshape(*a.scales.shape, 32).sum(2).astype(np.float32)
    codes = np.zeros(a8_bytes(*x.shape), np.int8)
    codes[_a8_places(x.size)] = a.codes.reshape(-1)
    return Operand("a8", x.shape[1], device.array(codes), device.array(a.scales), device.array(sums)), _exact(a)


def a8_bytes(n: int, width: int) -> int:
    """Of the codes of rows in memory."""
    return -(-n * width // 256) * 256


def a8_codes(device: EmulatedDevice, rows: Operand, n: int) -> npt.NDArray[np.int8]:
    """Codes of rows in "a8", int8 [n, width / 32, 32]."""
    codes: npt.NDArray[np.int8] = device.values(rows.data, np.int8, a8_bytes(n, rows.width))
    return codes[_a8_places(n * rows.width)].reshape(n, -1, 32)


def _a8_places(n: int) -> npt.NDArray[np.int64]:
    """The byte of each code: of 256 first the first halves of all units of 32, then the others, where units four apart have
    changed places."""
    at = np.arange(n)
    unit, half = at // 32 % 8, at // 16 % 2
    places: npt.NDArray[np.int64] = at // 256 * 256 + 128 * half + (unit ^ 4 * half) * 16 + at % 16
    return places


def _exact(a: Any) -> npt.NDArray[np.float64]:
    numbers: npt.NDArray[np.float64] = a.codes.astype(np.float64) * np.repeat(a.scales.astype(np.float64), 32, axis=1)
    return numbers


def rows_of_x(n: int, columns: int, rng: np.random.RandomState) -> F32:
    """Rows whose blocks of 32 columns differ in size by many orders of magnitude."""
    size = np.repeat(np.exp(rng.uniform(-8, 8, (n, -(-columns // 32)))), 32, axis=1)[:, :columns]
    rows: F32 = (rng.standard_normal((n, columns)) * size).astype(np.float32)
    return rows
