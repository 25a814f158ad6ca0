"""Where the lanes of a warp hold the elements of mma, by the formulas of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and its
neighbours), against the emulator's mma; and that the two products that stand in for one before sm_80 are that one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice

from pyinfer.kernels_gpu.launch import Kernel, Launch

pytestmark = pytest.mark.backend

SOURCE = """
#include "ptx.cuh"
extern "C" __global__ void raw_f16(const uint32_t* a, const uint32_t* b, float* d) {
  mma_f16(d + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}
extern "C" __global__ void raw_s8(const uint32_t* a, const uint32_t* b, int* d) {
  mma_s8(d + 4 * threadIdx.x, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
}
"""
Place = Callable[[int, int, int], tuple[int, int]]  # (group, thread in group, element) -> row, column


# ---- the formulas, one function an operand: i is the element's index in the vector expression of the lane
def a_16816(g: int, t: int, i: int) -> tuple[int, int]:
    row = g if 0 <= i < 2 or 4 <= i < 6 else g + 8
    return row, t * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_16816(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 2 + (i & 1) + (8 if i >= 2 else 0), g


def c_168(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def a_1688(g: int, t: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def b_1688(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 2 + i, g


def a_16832(g: int, t: int, i: int) -> tuple[int, int]:
    row = g if 0 <= i < 4 or 8 <= i < 12 else g + 8
    return row, t * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_16832(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 4 + (i & 3) + (16 if i >= 4 else 0), g


def a_8816(g: int, t: int, i: int) -> tuple[int, int]:
    return g, t * 4 + i


def b_8816(g: int, t: int, i: int) -> tuple[int, int]:
    return t * 4 + i, g


def c_88(g: int, t: int, i: int) -> tuple[int, int]:
    return g, t * 2 + i


def gathered(fragments: npt.NDArray[np.float64], place: Place, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """The matrix whose elements the lanes [32, n] hold; each place is held once."""
    matrix = np.full(shape, np.nan)
    for lane in range(32):
        for i in range(fragments.shape[1]):
            at = place(lane // 4, lane % 4, i)
            assert np.isnan(matrix[at]), "two lanes hold this element"
            matrix[at] = fragments[lane, i]
    assert not np.isnan(matrix).any()
    return matrix


def held(matrix: npt.NDArray[np.float64], place: Place, n: int) -> npt.NDArray[np.float64]:
    """What each lane holds of a matrix: [32, n]."""
    return np.array([[matrix[place(lane // 4, lane % 4, i)] for i in range(n)] for lane in range(32)])


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "raw.cu"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")
def test_float16(source: str) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(-8, 9, (32, 8)).astype(np.float16), rng.integers(-8, 9, (32, 4)).astype(np.float16)
    start = rng.integers(-8, 9, (32, 4)).astype(np.float32)
    device = EmulatedDevice()
    d = device.array(start)
    device.launch(Launch(Kernel(source, "raw_f16"), (1, 1, 1), (32, 1, 1), (device.array(a), device.array(b), d)))
    got = device.values(d, np.float32, 32, 4)
    device.close()
    full_a = gathered(a.astype(np.float64), a_16816, (16, 16))
    full_b = gathered(b.astype(np.float64), b_16816, (16, 8))
    expected = gathered(start.astype(np.float64), c_168, (16, 8)) + full_a @ full_b
    assert (held(expected, c_168, 4) == got).all()


@pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")
def test_int8(source: str) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(-128, 128, (32, 16)).astype(np.int8), rng.integers(-128, 128, (32, 8)).astype(np.int8)
    start = rng.integers(-9, 9, (32, 4)).astype(np.int32)
    device = EmulatedDevice()
    d = device.array(start)
    device.launch(Launch(Kernel(source, "raw_s8"), (1, 1, 1), (32, 1, 1), (device.array(a), device.array(b), d)))
    got = device.values(d, np.int32, 32, 4)
    device.close()
    full_a = gathered(a.astype(np.float64), a_16832, (16, 32))
    full_b = gathered(b.astype(np.float64), b_16832, (32, 8))
    expected = gathered(start.astype(np.float64), c_168, (16, 8)) + full_a @ full_b
    assert (held(expected, c_168, 4) == got).all()


def test_two_of_depth_8_are_one_of_depth_16() -> None:
    """ptx.cuh before sm_80: registers a[0], a[1] with b[0], then a[2], a[3] with b[1]."""
    rng = np.random.default_rng(3)
    a, b = rng.integers(-8, 9, (32, 8)).astype(np.float64), rng.integers(-8, 9, (32, 4)).astype(np.float64)
    parts = [
        gathered(a[:, 4 * i : 4 * i + 4], a_1688, (16, 8)) @ gathered(b[:, 2 * i : 2 * i + 2], b_1688, (8, 8))
        for i in range(2)
    ]
    whole = gathered(a, a_16816, (16, 16)) @ gathered(b, b_16816, (16, 8))
    assert (parts[0] + parts[1] == whole).all()


def test_four_of_8_by_16_are_one_of_16_by_32() -> None:
    """ptx.cuh before sm_80: register a[i] with b[i / 2] into d[2 * (i % 2)] and the next."""
    rng = np.random.default_rng(4)
    a, b = rng.integers(-9, 9, (32, 16)).astype(np.float64), rng.integers(-9, 9, (32, 8)).astype(np.float64)
    d = np.zeros((32, 4))
    for i in range(4):
        product = gathered(a[:, 4 * i : 4 * i + 4], a_8816, (8, 16)) @ gathered(
            b[:, 4 * (i // 2) : 4 * (i // 2) + 4], b_8816, (16, 8)
        )
        d[:, 2 * (i % 2) : 2 * (i % 2) + 2] += held(product, c_88, 2)
    whole = gathered(a, a_16832, (16, 32)) @ gathered(b, b_16832, (32, 8))
    assert (held(whole, c_168, 4) == d).all()
