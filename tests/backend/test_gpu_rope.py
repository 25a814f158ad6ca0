"""`rope.cu` on the emulator against the NumPy reference: every kind of rope, norms of heads, and every type of page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_pages import PagedStep, Pool, Span, layer_pages

from pyinfer.graph.reference import apply_rope, kept_as, rms_norm
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.pages import LayerPages
from pyinfer.kernels_gpu.rope import (
    HeadNorms,
    HeadShape,
    build_rope,
    build_rope_angles,
    build_rope_store,
    build_store,
    rope_frequencies,
)

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
F32Array = npt.NDArray[np.float32]
_FACTORS = np.linspace(1, 8, 64, dtype=np.float32)
ROPES = {
    "interleaved": Rope(128, "interleaved", 500000.0),
    "half": Rope(128, "half", 1e6),
    "linear": Rope(128, "half", 10000.0, "linear", 4.0),
    "yarn": Rope(128, "half", 10000.0, "yarn", 8.0, original_context=4096, attention_factor=0.9),
    "factors": Rope(128, "interleaved", 500000.0, frequency_factors=_FACTORS),
    "partial": Rope(96, "half", 10000.0),
    "partial interleaved": Rope(2, "interleaved", 10000.0),
}


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


def make_angles(device: EmulatedDevice, rope: Rope, step: PagedStep) -> Buffer:
    angles = device.alloc(4 * step.n_tokens * rope.n_dims)
    frequencies = device.array(rope_frequencies(rope))
    for launch in build_rope_angles(angles, rope, frequencies, step.fields(device), step.n_tokens):
        device.launch(launch)
    return angles


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_angles_are_exact_far_out(device: EmulatedDevice, rope: Rope) -> None:
    step = PagedStep([Span(0, 3), Span(131_000, 2)], 64, np.random.default_rng(0), n_tokens=6)
    got = device.values(make_angles(device, rope, step), np.float32, step.n_tokens, rope.n_dims // 2, 2)
    np.testing.assert_allclose(got, rope.cos_sin(step.positions), rtol=0, atol=6e-7 * rope.magnitude())


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rope_in_place(device: EmulatedDevice, rope: Rope) -> None:
    rng = np.random.default_rng(1)
    step = PagedStep([Span(7, 2), Span(4000)], 16, rng)
    x = rng.normal(0, 2, (3, 3 * 128)).astype(np.float32)
    rows = device.array(x)
    for launch in build_rope(rows, rows, 3 * 128, 128, rope, make_angles(device, rope, step), 3):
        device.launch(launch)
    got = device.values(rows, np.float32, *x.shape)
    np.testing.assert_allclose(got, apply_rope(x, 128, rope, step.positions), rtol=1e-5, atol=1e-5)


def test_rope_behind_a_norm(device: EmulatedDevice) -> None:
    rng = np.random.default_rng(2)
    rope, step = Rope(80, "half", 10000.0), PagedStep([Span(50, 2)], 16, rng)
    x, weight = rng.normal(0, 2, (2, 5 * 80)).astype(np.float32), rng.normal(1, 0.3, 80).astype(np.float32)
    out = device.empty(*x.shape)
    angles = make_angles(device, rope, step)
    for launch in build_rope(out, device.array(x), 5 * 80, 80, rope, angles, 2, device.array(weight), 1e-6):
        device.launch(launch)
    expected = apply_rope(rms_norm(x, weight, 1e-6), 80, rope, step.positions)
    np.testing.assert_allclose(device.values(out, np.float32, *x.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "f16"), ("bf16", "q8_0"), ("f32", "bf16")])
@pytest.mark.parametrize(("head", "block_size"), [(128, 16), (96, 1), (256, 13)])
def test_rope_and_store(
    device: EmulatedDevice, types: tuple[str, str], with_norms: bool, head: int, block_size: int
) -> None:
    rng = np.random.default_rng(head)
    shape = HeadShape(4, 2, head, block_size)
    step = PagedStep([Span(0, 5), Span(70), Span(33, 2)], block_size, rng, n_tokens=10)
    n = step.n_tokens
    q, k, v = (rng.normal(0, 3, (n, heads * head)).astype(np.float32) for heads in (4, 2, 2))
    k[1, :40], v[2] = 0, 0
    v[3, 0] = 1e9  # float16 saturates
    weights = [rng.normal(1, 0.3, head).astype(np.float32) for _ in range(2)]
    rope = Rope(head, "half", 10000.0)
    pools = [Pool(step, kind, 2, head) for kind in types]
    pages = layer_pages(device, *pools)
    norms = HeadNorms(device.array(weights[0]), device.array(weights[1]), 1e-6) if with_norms else None
    q_rows = device.array(q)
    launches = build_rope_store(
        q_rows, q_rows, device.array(k), device.array(v), shape, rope, make_angles(device, rope, step), step.fields(device),
        pages, n, norms,
    )  # fmt: skip
    assert len(launches) == 1
    device.launch(launches[0])

    expected_q, expected_k = (
        apply_rope(rms_norm(x, w, 1e-6) if with_norms else x, head, rope, step.positions)
        for x, w in zip((q, k), weights, strict=True)
    )
    np.testing.assert_allclose(device.values(q_rows, np.float32, *q.shape), expected_q, rtol=1e-5, atol=2e-5)
    check_stored(device, step, pools, pages, expected_k, v)


def check_stored(
    device: EmulatedDevice, step: PagedStep, pools: list[Pool], pages: LayerPages, k: F32Array, v: F32Array
) -> None:
    """Each token's slot holds its key and value, rounded; every other slot is as it was."""
    real = step.slots >= 0
    for pool, place, x in zip(pools, (pages.keys, pages.values), (k, v), strict=True):
        untouched = Pool(step, pool.kind, pool.codes.shape[1], pool.codes.shape[3])
        pool.download(device, place)
        got = pool.read(step.slots[real]).reshape(real.sum(), -1)
        limit = 65504 if pool.kind == "f16" else 127 * 515.5 if pool.kind == "q8_0" else np.inf
        clipped = np.clip(x[real], -limit, limit)
        expected = clipped.astype(np.float16) if pool.kind == "f16" else kept_as(pool.kind, clipped)
        step_of = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}.get(pool.kind)
        if step_of is not None:
            np.testing.assert_allclose(got, expected.astype(np.float32), rtol=step_of, atol=1e-5)
        else:
            blocks = np.abs(clipped).reshape(len(clipped), -1, 32).max(axis=2) / 127
            assert (np.abs(got - clipped) <= np.repeat(blocks, 32, axis=1) * 0.57 + 1e-6).all()
        untouched.write(step.slots[real], pool.read(step.slots[real]))
        page, offset = np.divmod(step.slots[real], step.block_size)
        untouched.codes[page, :, offset] = pool.codes[page, :, offset]
        np.testing.assert_array_equal(untouched.codes, pool.codes)


def test_store_as_it_is(device: EmulatedDevice) -> None:
    rng = np.random.default_rng(9)
    step = PagedStep([Span(3, 2), Span(8)], 4, rng, n_tokens=4)
    k, v = (rng.normal(0, 1, (4, 3 * 64)).astype(np.float32) for _ in range(2))
    pools = [Pool(step, "f16", 3, 64) for _ in range(2)]
    pages = layer_pages(device, *pools)
    for launch in build_store(device.array(k), device.array(v), HeadShape(3, 3, 64, 4), step.fields(device), pages, 4):
        device.launch(launch)
    check_stored(device, step, pools, pages, k, v)
