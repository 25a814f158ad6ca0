"""The "a8" format against its definition."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.graph.activation import quantize_activation

pytestmark = pytest.mark.unit


def test_a_block_by_hand() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [127, -127, 0.5, 1.5, 2.5, -0.5, -1.5, 63.4]  # amax 127: the scale is 1, ties round to even
    a = quantize_activation(x)
    assert a.codes.dtype == np.int8 and a.scales.dtype == np.float32
    assert a.scales.tolist() == [[1.0]]
    assert a.codes[0, :8].tolist() == [127, -127, 0, 2, 2, 0, -2, 63]
    assert a.dequantize()[0, :8].tolist() == [127, -127, 0, 2, 2, 0, -2, 63]


def test_each_block_of_32_has_its_own_scale() -> None:
    x = np.repeat(np.array([[1.0, 0.0, -254.0]], np.float32), 32, axis=1)
    a = quantize_activation(x)
    np.testing.assert_array_equal(a.scales, np.array([[1 / 127, 0, 2]], np.float32))
    np.testing.assert_array_equal(a.codes, np.repeat(np.array([[127, 0, -127]], np.int8), 32, axis=1))


@settings(derandomize=True, deadline=None)
@given(hnp.arrays(np.float32, (3, 64), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)))
def test_rounding_is_within_half_a_step(x: npt.NDArray[np.float32]) -> None:
    a = quantize_activation(x)
    step = np.repeat(a.scales, 32, axis=1)
    assert (np.abs(a.dequantize() - x) <= np.maximum(step * 0.5001, 1e-30)).all()  # smaller blocks are zero
    assert np.abs(a.codes.astype(int)).max() <= 127


def test_no_rows() -> None:
    assert quantize_activation(np.zeros((0, 64), np.float32)).dequantize().shape == (0, 64)
