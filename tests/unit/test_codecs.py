"""Every tensor type against gguf-py, against blocks worked out by hand, and against its own definition."""

from __future__ import annotations

import struct

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyinfer.errors import ModelError
from pyinfer.quant.codec import Codec
from pyinfer.quant.codecs import CODECS, codec_by_id, codec_by_name
from pyinfer.quant.k_scales import pack_scales, unpack_scales
from pyinfer.quant.q3_k import pack_q3_scales, unpack_q3_scales
from pyinfer.quant.tensor import QuantTensor

pytestmark = pytest.mark.unit

FLOATS = ("F32", "F16", "BF16")
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
INTEGERS = ("I8", "I16", "I32", "I64")

# Where the float16 factors of a block are.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(codec: Codec, n: int, seed: int) -> npt.NDArray[np.uint8]:
    """Random bytes; the float16 factors are of both signs, some zero, some subnormal."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, codec.block_bytes), dtype=np.uint8)
    for offset in HALVES.get(codec.name, ()):
        factors = rng.standard_normal(n).astype(np.float16)
        factors[::7] = 0
        factors[1::7] = (rng.standard_normal(len(factors[1::7])) * 2e-6).astype(np.float16)
        factors[2::7] = (rng.uniform(-6e4, 6e4, len(factors[2::7]))).astype(np.float16)
        blocks[:, offset : offset + 2] = factors.view(np.uint8).reshape(n, 2)
    return blocks[np.isfinite(codec.dequantize(blocks)).all(axis=-1)]


def oracle_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def assert_same_bits(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", FLOATS + LEGACY + K_TYPES)
def test_dequantize_equals_gguf_py(name: str) -> None:
    codec = CODECS[name]
    blocks = random_blocks(codec, 4000, seed=1)
    assert len(blocks) > 3000
    rows = blocks[:3000].reshape(30, -1)
    assert_same_bits(codec.dequantize(rows), gguf.quants.dequantize(rows, oracle_type(name)))


@pytest.mark.parametrize("name", FLOATS + LEGACY)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e4])
def test_quantize_equals_gguf_py(name: str, scale: float) -> None:
    codec = CODECS[name]
    weights = (np.random.default_rng(2).standard_normal((64, 256)) * scale).astype(np.float32)
    weights[3] = 0
    weights[4] = scale
    weights[5] = -scale
    weights[6, ::2] = 0
    theirs = gguf.quants.quantize(weights, oracle_type(name)).view(np.uint8)
    np.testing.assert_array_equal(codec.quantize(weights), theirs)


def test_geometry_equals_gguf_py() -> None:
    for oracle, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        codec = codec_by_id(oracle.value)
        sizes = (codec.block_size, codec.block_bytes)
        if codec.name == "Q8_1":  # gguf-py still counts two float32 factors; ggml's struct holds two float16
            assert sizes == (32, 36)
        else:
            assert (codec.name, *sizes) == (oracle.name, block_size, block_bytes)


# Blocks by hand. `half` is a float16 in the file's bytes; 0xE4 = 0b11_10_01_00 makes bit pair k the number k.


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def dequantize_one(name: str, block: bytes) -> list[float]:
    data = np.frombuffer(block, np.uint8)
    assert len(data) == CODECS[name].block_bytes
    return [float(w) for w in CODECS[name].dequantize(data)]


def test_plain_types_by_hand() -> None:
    assert dequantize_one("F32", bytes.fromhex("0000c0bf")) == [-1.5]
    assert dequantize_one("F16", bytes.fromhex("003e")) == [1.5]
    assert dequantize_one("BF16", bytes.fromhex("40c0")) == [-3.0]
    assert dequantize_one("F64", bytes.fromhex("000000000000e03f")) == [0.5]
    assert dequantize_one("I8", b"\xfe") == [-2.0]
    assert dequantize_one("I16", b"\x00\x01") == [256.0]
    assert dequantize_one("I32", b"\xff\xff\xff\xff") == [-1.0]
    assert dequantize_one("I64", b"\x03" + bytes(7)) == [3.0]


def test_q4_0_by_hand() -> None:
    block = half(0.5) + bytes(i | (15 - i) << 4 for i in range(16))
    expected = [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert dequantize_one("Q4_0", block) == expected + expected[::-1]


def test_q4_1_by_hand() -> None:
    block = half(-0.5) + half(10) + bytes(i | (15 - i) << 4 for i in range(16))
    expected = [10, 9.5, 9, 8.5, 8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5]
    assert dequantize_one("Q4_1", block) == expected + expected[::-1]


def test_q5_0_by_hand() -> None:
    # Nibbles 0..15 twice; the fifth bit is set for weights 0 and 31 alone.
    block = half(2) + b"\x01\x00\x00\x80" + bytes(i | i << 4 for i in range(16))
    low = [2.0 * (i - 16) for i in range(16)]
    assert dequantize_one("Q5_0", block) == [0.0, *low[1:], *low[:15], 30.0]


def test_q5_1_by_hand() -> None:
    block = half(2) + half(-1) + b"\x01\x00\x00\x80" + bytes(i | i << 4 for i in range(16))
    low = [2.0 * i - 1 for i in range(16)]
    assert dequantize_one("Q5_1", block) == [31.0, *low[1:], *low[:15], 61.0]


def test_q8_0_by_hand() -> None:
    block = half(-0.25) + struct.pack("32b", -128, 127, *range(30))
    assert dequantize_one("Q8_0", block) == [32.0, -31.75, *(-0.25 * i for i in range(30))]


def test_q2_k_by_hand() -> None:
    # Group j has scale j and minimum 15 - j; run k of each half holds code k.
    block = bytes(j | (15 - j) << 4 for j in range(16)) + b"\xe4" * 64 + half(1) + half(0.5)
    code = [0, 0, 1, 1, 2, 2, 3, 3] * 2
    expected = np.repeat([j * code[j] - 0.5 * (15 - j) for j in range(16)], 16)
    assert dequantize_one("Q2_K", block) == expected.tolist()


def test_q3_k_by_hand() -> None:
    # Third bits: set in the even runs of 32, so codes there keep their value, in odd runs 4 is taken off.
    # Scales: low nibble 1 for groups 0..7, 2 for 8..15; high bits k for groups 4k..4k+3.
    block = b"\x55" * 32 + b"\xe4" * 64 + b"\x21" * 8 + b"\xe4" * 4 + half(0.25)
    scale = [1] * 4 + [17] * 4 + [34] * 4 + [50] * 4
    code = [0, 0, 1 - 4, 1 - 4, 2, 2, 3 - 4, 3 - 4] * 2
    expected = np.repeat([0.25 * (scale[j] - 32) * code[j] for j in range(16)], 16)
    assert dequantize_one("Q3_K", block) == expected.tolist()


K_SCALE_BYTES = bytes([0x41, 0x42, 0x43, 0x44, 0x85, 0x86, 0x87, 0x88, 0x21, 0x21, 0x21, 0x21])
K_SCALES = [1, 2, 3, 4, 17, 17, 17, 17]
K_MINIMUMS = [5, 6, 7, 8, 34, 34, 34, 34]


def test_q4_k_by_hand() -> None:
    block = half(1) + half(2) + K_SCALE_BYTES + b"\x73" * 128
    expected = np.repeat([K_SCALES[g] * (7 if g % 2 else 3) - 2 * K_MINIMUMS[g] for g in range(8)], 32)
    assert dequantize_one("Q4_K", block) == expected.tolist()


def test_q5_k_by_hand() -> None:
    # Fifth bits: set in groups 0 and 3, byte 0b00001001.
    block = half(1) + half(2) + K_SCALE_BYTES + b"\x09" * 32 + b"\x73" * 128
    code = [19, 7, 3, 23, 3, 7, 3, 7]
    expected = np.repeat([K_SCALES[g] * code[g] - 2 * K_MINIMUMS[g] for g in range(8)], 32)
    assert dequantize_one("Q5_K", block) == expected.tolist()


def test_q6_k_by_hand() -> None:
    # In each half: runs 0 and 1 have nibble 3, runs 2 and 3 nibble 7; run k has high bits k.
    block = b"\x73" * 128 + b"\xe4" * 64 + struct.pack("16b", *range(-8, 8)) + half(0.5)
    code = [3 - 32, 3 - 32, 19 - 32, 19 - 32, 39 - 32, 39 - 32, 55 - 32, 55 - 32] * 2
    expected = np.repeat([0.5 * (j - 8) * code[j] for j in range(16)], 16)
    assert dequantize_one("Q6_K", block) == expected.tolist()


# Relative errors (root of mean square) of llama.cpp 0.3.36's reference quantizers on exactly these weights.
K_REFERENCE_ERROR = {
    "Q2_K": (0.29699, 0.34271), "Q3_K": (0.15092, 0.17578), "Q4_K": (0.07147, 0.08473),
    "Q5_K": (0.03619, 0.04286), "Q6_K": (0.01778, 0.02175),
}  # fmt: skip


def relative_error(codec: Codec, weights: npt.NDArray[np.float32]) -> float:
    restored = codec.dequantize(codec.quantize(weights))
    return float(np.sqrt(np.square(restored - weights).mean() / np.square(weights).mean()))


@pytest.mark.parametrize("name", K_TYPES)
def test_k_quantizer_is_as_good_as_the_reference(name: str) -> None:
    rng = np.random.default_rng(0)
    gauss = rng.standard_normal((256, 1024)).astype(np.float32) * np.float32(0.02)
    laplace = rng.laplace(size=(256, 1024)).astype(np.float32)
    for weights, reference in zip((gauss, laplace), K_REFERENCE_ERROR[name], strict=True):
        assert relative_error(CODECS[name], weights) < 1.03 * reference


@pytest.mark.parametrize("name", K_TYPES)
def test_k_quantizer_on_odd_rows(name: str) -> None:
    codec = CODECS[name]
    zero = np.zeros((2, 512), np.float32)
    np.testing.assert_array_equal(codec.dequantize(codec.quantize(zero)), zero)
    assert relative_error(codec, np.full((2, 512), -3, np.float32)) < 1e-3
    assert relative_error(codec, np.full((2, 512), 3, np.float32)) < 1e-3
    assert relative_error(codec, np.eye(4, 512, dtype=np.float32)) < 1e-3
    for extreme in (1e-30, 1e6, 1e30):
        weights = (np.random.default_rng(3).standard_normal((2, 512)) * extreme).astype(np.float32)
        assert np.isfinite(codec.dequantize(codec.quantize(weights))).all()


@pytest.mark.parametrize("name", K_TYPES)
def test_k_quantizer_keeps_what_the_type_can_express(name: str) -> None:
    """Weights that came out of blocks go back with a far smaller error than a code's step."""
    codec = CODECS[name]
    blocks = random_blocks(codec, 300, seed=4)
    weights = codec.dequantize(blocks)
    if name in ("Q2_K", "Q4_K", "Q5_K"):  # the reference family never stores negative factors, so neither do we
        for offset in HALVES[name]:
            factors = blocks[:, offset : offset + 2].copy().view(np.float16)
            blocks[:, offset : offset + 2] = np.abs(factors).view(np.uint8)
        weights = codec.dequantize(blocks)
    fine = {"Q2_K": 0.2, "Q3_K": 0.12, "Q4_K": 0.03, "Q5_K": 0.03, "Q6_K": 0.015}
    usable = (np.abs(weights).max(axis=-1) > 1e-2) & (np.abs(weights).max(axis=-1) < 1e6)
    assert usable.sum() > 100
    unit = weights[usable] / np.abs(weights[usable]).max(axis=-1, keepdims=True)
    assert relative_error(codec, unit) < fine[name]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, 64, elements=st.floats(-1e4, 1e4, width=32)), st.sampled_from(LEGACY))
def test_legacy_error_is_below_one_step(weights: npt.NDArray[np.float32], name: str) -> None:
    codec = CODECS[name]
    error = np.abs(codec.dequantize(codec.quantize(weights)) - weights).reshape(2, 32).max(axis=-1)
    blocks = weights.reshape(2, 32).astype(np.float64)
    width = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127}
    if name in width:
        step = np.abs(blocks).max(axis=-1) / width[name]
    else:
        step = (blocks.max(axis=-1) - blocks.min(axis=-1)) / (15 if name == "Q4_1" else 31)
    rounding = np.abs(blocks).max(axis=-1) * 2**-10 + 1e-5  # the float16 factors
    assert (error <= step * 1.001 + rounding).all()


@pytest.mark.parametrize("name", [*CODECS])
def test_swapping_bytes_twice_changes_nothing(name: str) -> None:
    codec = CODECS[name]
    data = np.random.default_rng(5).integers(0, 256, (3, 4 * codec.block_bytes), dtype=np.uint8)
    swapped = codec.swap_bytes(data)
    np.testing.assert_array_equal(codec.swap_bytes(swapped), data)
    touched = np.zeros(codec.block_bytes, bool)
    for offset, size, items in codec.wide_fields:
        touched[offset : offset + size * items] = True
    same = (swapped == data).reshape(-1, codec.block_bytes)
    assert same[:, ~touched].all()


def test_swapped_fields_are_the_factors() -> None:
    for name, offsets in HALVES.items():
        block = np.arange(CODECS[name].block_bytes, dtype=np.uint8)
        swapped = CODECS[name].swap_bytes(block)
        for offset in offsets:
            assert (swapped[offset], swapped[offset + 1]) == (offset + 1, offset)
    q5_0 = CODECS["Q5_0"].swap_bytes(np.arange(22, dtype=np.uint8))
    assert q5_0[:6].tolist() == [1, 0, 5, 4, 3, 2]  # the fifth bits are one uint32
    assert CODECS["F64"].swap_bytes(np.arange(8, dtype=np.uint8)).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_packed_scales_round_trip() -> None:
    rng = np.random.default_rng(6)
    packed = rng.integers(0, 256, (100, 12), dtype=np.uint8)
    np.testing.assert_array_equal(pack_scales(*unpack_scales(packed)), packed)
    np.testing.assert_array_equal(pack_q3_scales(unpack_q3_scales(packed)), packed)


def test_shapes_and_chunks() -> None:
    """Leading dimensions are kept, and a row's result does not depend on how many rows there are."""
    codec = CODECS["Q4_K"]
    weights = np.random.default_rng(7).standard_normal((2, 300, 512)).astype(np.float32)
    data = codec.quantize(weights)
    assert data.shape == (2, 300, 288)
    assert codec.dequantize(data).shape == weights.shape
    np.testing.assert_array_equal(codec.quantize(weights[1, 299]), data[1, 299])
    np.testing.assert_array_equal(codec.dequantize(data[1, 299]), codec.dequantize(data)[1, 299])
    assert codec.dequantize(np.empty((0, 144), np.uint8)).shape == (0, 256)


def test_tensor_rows() -> None:
    codec = CODECS["Q8_0"]
    weights = np.random.default_rng(8).standard_normal((2, 3, 64)).astype(np.float32)
    tensor = QuantTensor("experts", codec, (2, 3, 64), codec.quantize(weights).reshape(6, -1))
    whole = tensor.dequantize()
    assert whole.shape == (2, 3, 64)
    assert (tensor.n_elements, tensor.n_bytes) == (384, 6 * 68)
    np.testing.assert_array_equal(tensor.dequantize(slice(1, 3)), whole.reshape(6, 64)[1:3])
    np.testing.assert_array_equal(tensor.dequantize(np.array([5, 0, 5])), whole.reshape(6, 64)[[5, 0, 5]])


def test_registry() -> None:
    assert codec_by_name("q4_k") is CODECS["Q4_K"] is codec_by_id(12)
    assert not CODECS["IQ2_XXS"].supported
    with pytest.raises(ModelError, match="unknown tensor type 4;"):
        codec_by_id(4)
    with pytest.raises(ModelError, match="'Q9_X'"):
        codec_by_name("Q9_X")


def test_misuse_is_an_error_that_says_what() -> None:
    with pytest.raises(ModelError, match="IQ2_XXS is not supported"):
        CODECS["IQ2_XXS"].dequantize(np.zeros(66, np.uint8))
    with pytest.raises(ModelError, match="can only be read"):
        CODECS["IQ2_XXS"].quantize(np.zeros(256, np.float32))
    with pytest.raises(ModelError, match="row of 300 weights"):
        CODECS["Q4_K"].quantize(np.zeros((2, 300), np.float32))
    with pytest.raises(ModelError, match="145 bytes"):
        CODECS["Q4_K"].dequantize(np.zeros(145, np.uint8))
    for bad in (np.nan, np.inf):
        with pytest.raises(ModelError, match="NaN or infinite"):
            CODECS["Q8_0"].quantize(np.full(32, bad, np.float32))
    assert [name for name in (*INTEGERS, "F64") if CODECS[name].can_quantize] == []
    assert all(CODECS[name].can_quantize for name in FLOATS + LEGACY + K_TYPES)
