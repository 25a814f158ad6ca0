"""The encoders: exact types byte for byte, searched ones against the errors that llama.cpp leaves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llamacpp_quantize import ANSWERS, SEARCHED, WITH_IMATRIX, error, sample_weights

from pyinfer.convert.encode import encode, transcode
from pyinfer.errors import ModelError
from pyinfer.quant.codecs import codec_by_name

pytestmark = pytest.mark.unit

F32Array = npt.NDArray[np.float32]
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
MARGIN = 1.01  # of llama.cpp's error


def awkward_weights() -> F32Array:
    """Rows with zeros of both signs, constants, ties in magnitude, tiny and large numbers, halves of a step."""
    x = np.random.default_rng(0).normal(0, 0.02, (12, 64)).astype(np.float32)
    x[0, :32], x[0, 32:] = 0, -0.0
    x[1], x[2] = 1, -1
    x[3] *= 1e-6
    x[4] *= 1e6
    x[5] = np.round(x[5] * 50)
    x[6] = np.abs(x[6])
    x[7] = 0
    x[7, 3], x[7, 9], x[7, 40], x[7, 50] = -1, 1, 1, -1
    x[8] = np.linspace(-4, 3.5, 64)
    x[9] = np.arange(64) - 63.5
    return x


@pytest.mark.parametrize("name", EXACT)
def test_exact_types_equal_gguf_pys_and_the_codecs_bytes(name: str) -> None:
    weights = awkward_weights()
    found = encode(name, weights)
    np.testing.assert_array_equal(found, codec_by_name(name).quantize(weights))
    usual = weights[[3, 5, 6, 8, 9, 10, 11]]  # gguf-py leaves the sign of zero scales as NumPy has it
    expected = gguf.quants.quantize(usual, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(encode(name, usual), expected)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-4, 1e3), name=st.sampled_from(EXACT))
def test_exact_types_on_random_rows(seed: int, scale: float, name: str) -> None:
    weights = np.random.default_rng(seed).standard_t(3, (2, 96)).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(encode(name, weights), codec_by_name(name).quantize(weights))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("columns", [64, 50])
def test_floats_round_as_the_codecs_do(name: str, columns: int) -> None:
    weights = awkward_weights()[:, :columns].copy()
    weights[10, :4] = np.inf, -np.inf, 1e-40, 7e4
    weights[11, 0] = np.nan
    np.testing.assert_array_equal(encode(name, weights), codec_by_name(name).quantize(weights))


@pytest.mark.parametrize("name", SEARCHED)
def test_error_is_not_above_llamacpps(name: str) -> None:
    weights, _ = sample_weights()
    restored = codec_by_name(name).dequantize(encode(name, weights))
    assert error(weights, restored, None) <= MARGIN * json.loads(ANSWERS.read_text())["errors"]["plain"][name]


@pytest.mark.parametrize("name", WITH_IMATRIX)
def test_weighted_error_is_not_above_llamacpps(name: str) -> None:
    weights, importances = sample_weights()
    codec = codec_by_name(name)
    found = error(weights, codec.dequantize(encode(name, weights, importances)), importances)
    assert found <= MARGIN * json.loads(ANSWERS.read_text())["errors"]["imatrix"][name]
    assert found < error(weights, codec.dequantize(encode(name, weights)), importances)


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_types_keep_constants_zeros_and_outliers(name: str) -> None:
    weights = np.zeros((4, 256), np.float32)
    weights[1] = 0.75
    weights[2, 17] = -3.0
    weights[3] = np.repeat(np.linspace(-1, 1, 8), 32)
    codec = codec_by_name(name)
    restored = codec.dequantize(encode(name, weights))
    assert not restored[0].any()
    np.testing.assert_allclose(restored[1], 0.75, rtol=0.01)
    np.testing.assert_allclose(restored[2], weights[2], atol=0.04)
    np.testing.assert_allclose(restored[3], weights[3], atol=0.1)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-3, 3), name=st.sampled_from(SEARCHED))
def test_searched_types_are_never_worse_than_the_codecs_search(seed: int, exponent: int, name: str) -> None:
    """The codec's search in NumPy weighs weights in another way, hence the room."""
    weights = np.random.default_rng(seed).normal(0, 10.0**exponent, (4, 256)).astype(np.float32)
    codec = codec_by_name(name)
    ours = error(weights, codec.dequantize(encode(name, weights)), None)
    assert ours <= 1.02 * error(weights, codec.dequantize(codec.quantize(weights)), None)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_bytes_do_not_depend_on_threads_or_neighbours(name: str) -> None:
    weights = np.random.default_rng(1).normal(0, 1, (700, 256)).astype(np.float32)
    whole = encode(name, weights, n_threads=3)
    np.testing.assert_array_equal(whole, encode(name, weights, n_threads=1))
    np.testing.assert_array_equal(whole[123:125], encode(name, weights[123:125]))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a CPU of x86")
def test_bytes_do_not_depend_on_the_cpu() -> None:
    """The same digest from code for the oldest x86-64 as from code for this machine."""
    program = """
import hashlib, numpy as np
from pyinfer.convert.encode import encode
weights = np.random.default_rng(4).standard_t(4, size=(16, 256)).astype(np.float32)
importances = np.random.default_rng(5).random(256).astype(np.float32)
parts = [encode(name, weights, w).tobytes() for name in ("Q4_K", "Q6_K") for w in (None, importances)]
print(hashlib.sha256(b"".join(parts)).hexdigest())
"""
    oldest = {"PYINFER_ISA": "portable", "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **extra},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for extra in ({}, oldest)
    ]
    assert digests[0] == digests[1] and len(digests[0]) > 60


@pytest.mark.parametrize("name", [*EXACT, "Q4_K", "F32", "F16", "BF16"])
def test_other_sources_than_float32(name: str) -> None:
    weights = np.random.default_rng(2).normal(0, 1, (8, 256)).astype(np.float32)
    weights[0, :5] = 0.0, -0.0, 6e-8, -3e-5, 65504.0
    for source in ("F16", "BF16", "Q8_0"):
        codec = codec_by_name(source)
        data = codec.quantize(weights)
        np.testing.assert_array_equal(transcode(codec, data, name, n_threads=2), encode(name, codec.dequantize(data)))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_other_sources_keep_what_is_not_finite(name: str) -> None:
    weights = np.ones((2, 64), np.float32)
    weights[0, 3], weights[1, 40], weights[1, 63] = np.inf, -np.inf, np.nan
    for source in ("F16", "BF16"):
        found = codec_by_name(name).dequantize(
            transcode(codec_by_name(source), codec_by_name(source).quantize(weights), name)
        )
        np.testing.assert_array_equal(found, weights)


def test_columns_that_never_mattered_still_get_codes() -> None:
    weights = np.random.default_rng(3).normal(0, 1, (8, 256)).astype(np.float32)
    importances = np.ones(256, np.float32)
    importances[64:128] = 0
    restored = codec_by_name("Q4_K").dequantize(encode("Q4_K", weights, importances))
    assert np.abs(restored - weights).max() < 0.5
    nothing = encode("Q4_K", weights, np.zeros(256, np.float32))
    np.testing.assert_array_equal(nothing, encode("Q4_K", weights, np.ones(256, np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    weights = np.ones((300, 256), np.float32)
    weights[299, 255] = value
    for source in ("F32", "F16", "BF16"):
        codec = codec_by_name(source)
        with pytest.raises(ModelError, match="NaN or infinite"):
            transcode(codec, codec.quantize(weights), name)


@pytest.mark.parametrize(
    ("importances", "message"),
    [(np.ones(128), "256 columns"), (-np.ones(256), "negative"), (np.full(256, np.nan), "NaN")],
)
def test_importances_that_make_no_sense(importances: npt.NDArray[np.float64], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        encode("Q4_K", np.ones((2, 256), np.float32), importances.astype(np.float32))


def test_rows_that_do_not_fill_a_block() -> None:
    with pytest.raises(ModelError, match="no multiple of Q4_K's block of 256"):
        encode("Q4_K", np.ones((2, 288), np.float32))
