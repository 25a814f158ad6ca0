"""Packed weights back to numbers on emulated threads: bit for bit what the codec says."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import random_blocks, rng_of
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import upload

from pyinfer.kernels_gpu.unpack import build_dequantize, build_embed
from pyinfer.kernels_gpu.weights_layout import KINDS, layout_of, pack
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]

ROWS = 11


def columns_of(kind: str) -> tuple[int, ...]:
    """A row of one block, one of an odd number of them; for float types also what is no multiple of 16 bytes."""
    return {256: (256, 768), 32: (32, 288, 640), 1: (16, 77, 576)}[codec_by_name(kind).block_size]


CASES = [(kind, columns) for kind in KINDS for columns in columns_of(kind)]


@pytest.mark.parametrize("kind, columns", CASES)
def test_embed(kind: str, columns: int) -> None:
    rng = rng_of(kind, columns)
    data = random_blocks(kind, ROWS, columns, rng)
    device = EmulatedDevice()
    ids = np.array([3, 0, ROWS - 1, -1, 3], np.int32)
    out = device.empty(len(ids), columns)
    for launch in build_embed(out, upload(device, kind, data, columns), device.array(ids), 1.75, len(ids)):
        device.launch(launch)
    rows = codec_by_name(kind).dequantize(data[ids]) * np.float32(1.75)
    rows[3] = 0
    np.testing.assert_array_equal(device.values(out, np.float32, len(ids), columns), rows)
    device.close()


@pytest.mark.parametrize("kind, columns", CASES)
def test_dequantize(kind: str, columns: int) -> None:
    rng = rng_of(kind, columns)
    data = random_blocks(kind, ROWS, columns, rng)
    device = EmulatedDevice()
    weight = upload(device, kind, data, columns)
    expected = codec_by_name(kind).dequantize(data)
    for first, n_rows in ((0, ROWS), (2, 1), (5, None)):
        rows = expected[first : None if n_rows is None else first + n_rows]
        out = device.empty(rows.size, dtype=np.float16)
        for launch in build_dequantize(out, weight, first, n_rows, gain=4.0):
            device.launch(launch)
        with np.errstate(over="ignore"):
            rounded = (rows * np.float32(4)).astype(np.float16)
        np.testing.assert_array_equal(device.values(out, np.float16, *rows.shape), rounded)
    device.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_and_row_is_aligned(kind: str) -> None:
    columns = columns_of(kind)[1]
    layout = layout_of(kind, ROWS, columns)
    assert all(part.offset % 256 == 0 and part.row_bytes % 16 == 0 for part in layout.parts)
    codec = codec_by_name(kind)
    data = random_blocks(kind, ROWS, columns, rng_of(kind))
    covered = np.zeros(layout.n_bytes, np.int64)
    for offset, piece in pack(QuantTensor("w", codec, (ROWS, columns), data)):
        covered[offset : offset + len(piece)] += 1
    assert covered.max() == 1
    assert covered.sum() == sum(part.row_bytes * ROWS for part in layout.parts)


def test_rows_that_are_whole_blocks_take_no_more_than_in_the_file() -> None:
    """But Q3_K, whose 6-bit scales become bytes."""
    for kind in KINDS:
        if kind != "Q3_K":
            assert layout_of(kind, 64, 2048).n_bytes == 64 * codec_by_name(kind).row_bytes(2048), kind
