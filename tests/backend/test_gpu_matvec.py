"""`gemv.cu` for every weight type and 1 to 8 rows, on emulated threads, against float64 over the codec's weights."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import F32, dequantized, random_blocks, rng_of
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import operand, rows_of_x, upload

from pyinfer.kernels_gpu.matvec import Product, build_matvec
from pyinfer.kernels_gpu.matvec_tuning import Tuning
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES, KINDS
from pyinfer.quant.codecs import codec_by_name

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]

ARCH = 90


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
