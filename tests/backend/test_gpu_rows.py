"""`rows.cu` on the emulator against the NumPy reference: every op in every form, in place where that is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import a8_bytes, a8_codes

from pyinfer.graph.activation import quantize_activation
from pyinfer.graph.ops import Activation
from pyinfer.graph.reference import activate, rms_norm
from pyinfer.kernels_gpu.launch import Launch
from pyinfer.kernels_gpu.operand import FORMS, Form, Operand
from pyinfer.kernels_gpu.rows import (
    BeforeNorm,
    build_add,
    build_gated,
    build_head_norm,
    build_quantize,
    build_rms_norm,
    build_select_rows,
)

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
F32Array = npt.NDArray[np.float32]


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


def empty_rows(device: EmulatedDevice, form: Form, n_rows: int, width: int) -> Operand:
    """Poisoned memory for a result, each part a buffer of its own, so that its end is guarded."""
    if form == "f32":
        return Operand(form, width, device.empty(n_rows, width))
    if form == "h16":
        return Operand(form, width, device.empty(n_rows, width, dtype=np.float16), device.empty(n_rows))
    blocks = (n_rows, width // 32)
    return Operand(
        form,
        width,
        device.empty(a8_bytes(n_rows, width), dtype=np.int8),
        device.empty(*blocks),
        device.empty(*blocks),
    )


def read_rows(device: EmulatedDevice, rows: Operand, n_rows: int) -> F32Array:
    """What rows stand for; the parts of an a8 row are checked against each other."""
    if rows.form == "f32":
        return device.values(rows.data, np.float32, n_rows, rows.width)
    assert rows.scales is not None
    if rows.form == "h16":
        scales = device.values(rows.scales, np.float32, n_rows, 1)
        halves = device.values(rows.data, np.float16, n_rows, rows.width).astype(np.float32)
        assert (np.frexp(scales)[0] == 0.5).all()
        top = np.abs(halves).max(axis=1)
        assert ((top == 0) | (top >= 2**14) & (top <= 2**15)).all()
        return halves * scales
    assert rows.sums is not None
    codes = a8_codes(device, rows, n_rows).astype(np.float32)
    scales, sums = (device.values(part, np.float32, n_rows, rows.width // 32) for part in (rows.scales, rows.sums))
    np.testing.assert_allclose(sums, codes.sum(axis=2) * scales, rtol=1e-6)
    return (codes * scales[:, :, None]).reshape(n_rows, rows.width)


def check(device: EmulatedDevice, launches: Sequence[Launch], out: Operand, expected: F32Array) -> None:
    for launch in launches:
        device.launch(launch)
    got = read_rows(device, out, len(expected))
    assert np.isfinite(got).all()
    if out.form == "a8":  # a value at a rounding's edge may fall to the other side
        step = np.repeat(np.abs(expected).reshape(len(expected), -1, 32).max(axis=2) / 127, 32, axis=1)
        exact = quantize_activation(expected).dequantize()
        assert (np.abs(got - expected) <= step * 0.51 + 1e-30).all()
        assert np.count_nonzero(np.abs(got - exact) > step * 0.01) <= 1 + 0.01 * got.size
    else:
        tolerance = 1e-5 if out.form == "f32" else 5e-4
        top = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(got - expected) <= tolerance * (np.abs(expected) + 0.05 * top)).all()


def rows_of(rng: np.random.Generator, n_rows: int, width: int) -> F32Array:
    """Rows of very different sizes, with a zero row and a block of zeros."""
    x = rng.normal(0, 1, (n_rows, width)) * 10.0 ** rng.integers(-6, 6, (n_rows, 1))
    x[0, : min(width, 32)] = 0
    if n_rows > 2:
        x[2] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n_rows", "width"), [(3, 64), (17, 1152), (2, 8960)])
def test_rms_norm(device: EmulatedDevice, form: Form, n_rows: int, width: int) -> None:
    rng = np.random.default_rng(width)
    x, weight = rows_of(rng, n_rows, width), rng.normal(1, 0.5, width).astype(np.float32)
    out = empty_rows(device, form, n_rows, width)
    launches = build_rms_norm(out, device.array(x), device.array(weight), 1e-5, n_rows)
    check(device, launches, out, rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_norm_with_what_comes_before(device: EmulatedDevice, form: Form, with_norm: bool, in_place: bool) -> None:
    rng = np.random.default_rng(7)
    n_rows, width = 5, 640
    x, residual = (rng.normal(0, 2, (n_rows, width)).astype(np.float32) for _ in range(2))
    first, second = (rng.normal(1, 0.5, width).astype(np.float32) for _ in range(2))
    out, kept = empty_rows(device, form, n_rows, width), device.array(residual)
    total = kept if in_place else device.empty(n_rows, width)
    before = BeforeNorm(kept, total, device.array(first) if with_norm else None, 1e-6)
    launches = build_rms_norm(out, device.array(x), device.array(second), 1e-5, n_rows, before)
    expected = (rms_norm(x, first, 1e-6) if with_norm else x) + residual
    check(device, launches, out, rms_norm(expected, second, 1e-5))
    np.testing.assert_allclose(device.values(total, np.float32, n_rows, width), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("n_rows", "width", "head"), [(3, 720, 80), (9, 512, 256)])
def test_head_norm_in_place(device: EmulatedDevice, n_rows: int, width: int, head: int) -> None:
    rng = np.random.default_rng(head)
    x, weight = rows_of(rng, n_rows, width), rng.normal(1, 0.5, head).astype(np.float32)
    rows = Operand("f32", width, device.array(x))
    launches = build_head_norm(rows, rows.data, device.array(weight), head, 1e-5, n_rows)
    check(device, launches, rows, rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 96), (4, 5632)])
def test_gated(device: EmulatedDevice, form: Form, activation: Activation, n_rows: int, width: int) -> None:
    rng = np.random.default_rng(n_rows)
    gate, up = (rng.normal(0, 4, (n_rows, width)).astype(np.float32) for _ in range(2))
    gate[0, :4] = [-200, 200, 0, -88]
    out = empty_rows(device, form, n_rows, width)
    expected = activate(gate, activation) * up
    launches = build_gated(out, device.array(gate), device.array(up), activation, n_rows)
    check(device, launches, out, expected)


@pytest.mark.parametrize("form", FORMS)
def test_add_quantize_and_select(device: EmulatedDevice, form: Form) -> None:
    rng = np.random.default_rng(3)
    a, b = (rows_of(rng, 6, 288) for _ in range(2))
    builders: list[tuple[Callable[[Operand], list[Launch]], int, F32Array]] = [
        (lambda out: build_add(out, device.array(a), device.array(b), 6), 6, a + b),
        (lambda out: build_quantize(out, device.array(a), 6), 6, a),
    ]
    rows = np.array([5, 0, 3, -1], np.int32)
    picked = np.where(rows[:, None] >= 0, a[rows], np.float32(0))
    builders.append((lambda out: build_select_rows(out, device.array(a), device.array(rows), 4), 4, picked))
    for build, n_rows, expected in builders:
        out = empty_rows(device, form, n_rows, 288)
        check(device, build(out), out, expected)


def test_add_in_place(device: EmulatedDevice) -> None:
    rng = np.random.default_rng(4)
    a, b = (rows_of(rng, 3, 1024) for _ in range(2))
    rows = Operand("f32", 1024, device.array(a))
    check(device, build_add(rows, rows.data, device.array(b), 3), rows, a + b)


def test_threads_in_any_order_give_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    x, weight = rows_of(rng, 3, 1024), rng.normal(1, 0.5, 1024).astype(np.float32)
    results = []
    for descending in (False, True):
        device = EmulatedDevice(descending=descending)
        out = empty_rows(device, "a8", 3, 1024)
        for launch in build_rms_norm(out, device.array(x), device.array(weight), 1e-5, 3):
            device.launch(launch)
        results.append(read_rows(device, out, 3))
        device.close()
    np.testing.assert_array_equal(results[0], results[1])
