"""`gemv_gated.cu` on emulated threads gives the bits of products and activation one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_kernels import dequantized, random_blocks, rng_of
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import a8_codes, operand, rows_of_x, upload

from pyinfer.graph.activation import quantize_activation
from pyinfer.graph.ops import Activation
from pyinfer.graph.reference import activate
from pyinfer.kernels_gpu.launch import Launch
from pyinfer.kernels_gpu.matvec import Product, RowNorm, build_matvec, takes_norm
from pyinfer.kernels_gpu.matvec_gated import build_gated_matvec, can_fuse_gated, gated_takes_norm
from pyinfer.kernels_gpu.matvec_tuning import (
    STATIC_SHARED_BYTES,
    Problem,
    default_tuning,
    gated_neighbours,
    gated_tuning,
)
from pyinfer.kernels_gpu.operand import Form, Operand, operand_at, operand_bytes
from pyinfer.kernels_gpu.rows import build_gated, build_rms_norm
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES, KINDS
from pyinfer.quant.codecs import codec_by_name

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]

ROWS = 96


def contents(device: EmulatedDevice, out: Operand, n: int) -> list[Any]:
    if out.form == "f32":
        return [device.values(out.data, np.float32, n, out.width)]
    assert out.scales is not None and out.sums is not None
    blocks = (n, out.width // 32)
    scales, sums = (device.values(part, np.float32, *blocks) for part in (out.scales, out.sums))
    return [a8_codes(device, out, n).reshape(n, -1), scales, sums]


def poisoned(device: EmulatedDevice, form: Form, n: int) -> Operand:
    return operand_at(form, n, ROWS, device.empty(operand_bytes(form, n, ROWS), dtype=np.uint8))


@pytest.mark.parametrize("n_sms", [1, 64], ids=["4 rows a lane", "2 rows a lane"])
@pytest.mark.parametrize(
    "kind, columns, n, form, activation",
    [
        ("Q4_K", 1280, 1, "a8", "silu"), ("Q4_K", 256, 5, "a8", "silu"), ("Q6_K", 768, 2, "a8", "gelu_tanh"),
        ("Q8_0", 576, 8, "a8", "silu"), ("Q4_1", 288, 3, "f32", "silu"), ("F16", 77, 2, "f32", "gelu_tanh"),
        ("BF16", 576, 4, "a8", "silu"),
    ],
)  # fmt: skip
def test_the_bits_of_separate_kernels(
    kind: str, columns: int, n: int, form: Form, activation: Activation, n_sms: int
) -> None:
    rng = rng_of(kind, columns)
    data = [random_blocks(kind, ROWS, columns, rng) for _ in range(2)]
    values = rows_of_x(8, columns, rng)[:n] * np.float32(1e-4)
    device = EmulatedDevice()
    x, exact = operand(device, values, "f32" if kind in FLOAT_BYTES else "a8")
    gate, up = (upload(device, kind, blocks, columns) for blocks in data)
    apart, together = poisoned(device, form, n), poisoned(device, form, n)
    outs = [device.empty(n, ROWS) for _ in range(2)]
    products = [Product(gate, outs[0]), Product(up, outs[1])]
    problem = Problem((kind, kind), 2 * ROWS, columns, n)
    unsplit = gated_tuning(problem, n_sms, 90)
    for launch in build_matvec(x, products, n, n_sms=n_sms, arch=90, tuning=unsplit):
        device.launch(launch)
    for step in build_gated(apart, outs[0], outs[1], activation, n):
        assert isinstance(step, Launch)
        device.launch(step)
    for launch in build_gated_matvec(together, x, gate, up, activation, n, n_sms=n_sms, arch=90):
        device.launch(launch)
    for ours, separate in zip(contents(device, together, n), contents(device, apart, n), strict=True):
        np.testing.assert_array_equal(ours, separate)

    weights = [dequantized(kind, blocks) for blocks in data]
    first = (exact @ weights[0].T).astype(np.float32)
    expected = (activate(first, activation) * (exact @ weights[1].T)).astype(np.float32)
    if form == "a8":
        codes, scales, _ = contents(device, together, n)
        result = codes * np.repeat(scales, 32, axis=1)
        expected = quantize_activation(expected).dequantize()
    else:
        result = contents(device, together, n)[0]
    assert np.linalg.norm(result - expected) <= 2e-3 * np.linalg.norm(expected)
    device.close()


@pytest.mark.parametrize(
    "kind, columns", [("Q4_K", 256), ("Q6_K", 4096), ("Q8_0", 576), ("Q5_0", 1184), ("Q4_K", 2304)]
)
def test_the_bits_of_a_norm_before(kind: str, columns: int) -> None:
    """Every block normalizes the row as the kernel does that writes it for many rows."""
    rng = rng_of(kind, columns)
    device = EmulatedDevice()
    values = rows_of_x(1, columns, rng)
    x, weight = (
        Operand("f32", columns, device.array(values)),
        device.array(rng.standard_normal(columns).astype(np.float32)),
    )
    normed = operand_at("a8", 1, columns, device.empty(operand_bytes("a8", 1, columns), dtype=np.uint8))
    for step in build_rms_norm(normed, x.data, weight, 1e-5, 1):
        device.launch(step)
    gate, up = (upload(device, kind, random_blocks(kind, ROWS, columns, rng), columns) for _ in range(2))
    norm = RowNorm(weight, 1e-5)
    assert takes_norm([gate, up], 4, 90) and gated_takes_norm(gate, 4, 90) and not takes_norm([gate], 4, 75)

    outs = [device.empty(1, ROWS) for _ in range(4)]
    (apart,) = build_matvec(normed, [Product(gate, outs[0]), Product(up, outs[1])], 1, n_sms=4, arch=90)
    (together,) = build_matvec(x, [Product(gate, outs[2]), Product(up, outs[3])], 1, n_sms=4, arch=90, norm=norm)
    for launch in (apart, together):
        device.launch(launch)
    results = [device.values(out, np.float32, ROWS) for out in outs]
    np.testing.assert_array_equal(results[:2], results[2:])

    pairs = poisoned(device, "a8", 1), poisoned(device, "a8", 1)
    for out, rows, own in zip(pairs, (normed, x), (None, norm), strict=True):
        for launch in build_gated_matvec(out, rows, gate, up, "silu", 1, n_sms=4, arch=90, norm=own):
            device.launch(launch)
    for ours, separate in zip(contents(device, pairs[1], 1), contents(device, pairs[0], 1), strict=True):
        np.testing.assert_array_equal(ours, separate)
    device.close()


def test_tunings() -> None:
    """Whole passes in every block, memory that a block may have; and the order of sums of the product by itself."""
    for kind in KINDS:
        for rows, columns in ((1536, 768), (8192, 2048), (14336, 4096), (28672, 8192)):
            for n in range(1, 9):
                problem = Problem((kind, kind), 2 * rows, columns, n)
                tuning = gated_tuning(problem, 132, 90)
                pairs = tuning.warps * (32 // tuning.lanes) * tuning.rows // 2
                assert tuning.rows % 2 == 0 and 32 % pairs == 0, problem
                assert tuning.shared_bytes(problem) <= STATIC_SHARED_BYTES
                assert tuning.depth > 1 and gated_tuning(problem, 40, 75).depth == 1
                assert tuning.lanes == default_tuning(problem, 132, 90).lanes
                for other in gated_neighbours(tuning, problem, 90):
                    assert 32 % (other.warps * (32 // other.lanes) * other.rows // 2) == 0 and other.rows % 2 == 0
                    assert other.lanes == tuning.lanes or n == 1


def test_what_is_not_alike_is_not_fused() -> None:
    device = EmulatedDevice()
    make = lambda kind, rows: upload(device, kind, np.zeros((rows, codec_by_name(kind).row_bytes(256)), np.uint8), 256)  # noqa: E731
    assert can_fuse_gated(make("Q4_K", 64), make("Q4_K", 64))
    assert not can_fuse_gated(make("Q4_K", 64), make("Q6_K", 64))
    assert not can_fuse_gated(make("Q4_K", 64), make("Q4_K", 32))
    assert not can_fuse_gated(make("Q4_K", 48), make("Q4_K", 48))
    device.close()
