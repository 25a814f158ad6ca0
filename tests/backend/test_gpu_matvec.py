"""`gemv.cu` for every weight type and 1 to 8 rows, on emulated threads, against float64 over the codec's weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import F32, dequantized, random_blocks, rng_of
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice

from pyinfer.graph.activation import quantize_activation
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.matvec import Product, build_matvec
from pyinfer.kernels_gpu.matvec_tuning import Tuning
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES, KINDS, layout_of, pack
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]

F64 = npt.NDArray[np.float64]
ARCH = 90


def upload(device: EmulatedDevice, kind: str, data: npt.NDArray[np.uint8], columns: int) -> DeviceWeight:
    layout = layout_of(kind, len(data), columns)
    weight = DeviceWeight(layout, device.alloc(layout.n_bytes))
    for offset, piece in pack(QuantTensor("w", codec_by_name(kind), (len(data), columns), data)):
        device.upload(weight.buffer, piece, offset)
    return weight


def operand(device: EmulatedDevice, x: F32, form: str) -> tuple[Operand, F64]:
    """Rows on the device and the numbers that they stand for."""
    if form == "f32":
        return Operand("f32", x.shape[1], device.array(x)), x.astype(np.float64)
    a = quantize_activation(x)
    sums = a.scales * a.codes.reshape(*a.scales.shape, 32).sum(2).astype(np.float32)
    exact = a.codes.astype(np.float64) * np.repeat(a.scales.astype(np.float64), 32, axis=1)
    return Operand("a8", x.shape[1], device.array(a.codes), device.array(a.scales), device.array(sums)), exact


def rows_of_x(n: int, columns: int, rng: np.random.RandomState) -> F32:
    """Rows whose blocks differ in size by many orders of magnitude."""
    scale = np.exp(rng.uniform(-8, 8, (n, -(-columns // 32))))
    return (rng.standard_normal((n, columns)) * np.repeat(scale, 32, axis=1)[:, :columns]).astype(np.float32)


def run(
    kinds: tuple[str, ...],
    rows: tuple[int, ...],
    columns: int,
    n_tokens: int,
    *,
    biased: bool = False,
    residual: bool = False,
    tuning: Tuning | None = None,
    descending: bool = False,
) -> list[F32]:
    """Outputs of the kernel, compared with float64 within 2e-5 of what the terms' magnitudes allow."""
    rng = rng_of(kinds, rows, columns)
    device = EmulatedDevice(descending=descending)
    data = [random_blocks(kind, n, columns, rng) for kind, n in zip(kinds, rows, strict=True)]
    x = rows_of_x(8, columns, rng)[:n_tokens]
    on_device, exact = operand(device, x, "f32" if kinds[0] in FLOAT_BYTES else "a8")
    biases = [rng.standard_normal(n).astype(np.float32) if biased else None for n in rows]
    added = rng.standard_normal((8, rows[0])).astype(np.float32)[:n_tokens] if residual else None
    outs = [device.array(added) if added is not None else device.empty(n_tokens, n) for n in rows]
    products = [
        Product(upload(device, kind, blocks, columns), out, None if bias is None else device.array(bias))
        for kind, blocks, out, bias in zip(kinds, data, outs, biases, strict=True)
    ]
    launches = build_matvec(
        on_device, products, n_tokens, n_sms=4, arch=ARCH, residual=outs[0] if residual else None, tuning=tuning
    )
    for launch in launches:
        device.launch(launch)
    results = [device.values(out, np.float32, n_tokens, n).copy() for out, n in zip(outs, rows, strict=True)]
    for kind, blocks, bias, result in zip(kinds, data, biases, results, strict=True):
        weights = dequantized(kind, blocks)
        expected, size = exact @ weights.T, np.abs(exact) @ np.abs(weights).T
        if bias is not None:
            expected, size = expected + bias, size + np.abs(bias)
        if added is not None:
            expected, size = expected + added, size + np.abs(added)
        assert np.isfinite(result).all()
        assert (np.abs(result - expected) <= 2e-5 * size + 1e-30).all(), (np.abs(result - expected) / size).max()
        assert np.linalg.norm(result - expected) <= 2e-3 * np.linalg.norm(expected)
    device.close()
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", range(1, 9))
def test_every_type_and_number_of_rows(kind: str, n_tokens: int) -> None:
    columns = 512 if codec_by_name(kind).block_size == 256 else 288
    run((kind,), (37,), columns, n_tokens, biased=True, residual=True)
