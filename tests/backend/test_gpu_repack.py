"""Repacking on emulated threads gives the bytes that `weights_layout.pack` gives, for every byte of a file's blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import rng_of
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import upload

from pyinfer.kernels_gpu.repack import build_repack, can_repack
from pyinfer.kernels_gpu.weights_layout import KINDS, WeightLayout, layout_of
from pyinfer.quant.codecs import codec_by_name

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]

ROWS = 7
BLOCK_KINDS = [kind for kind in KINDS if can_repack(layout_of(kind, 1, 256))]


def parts_of(layout: WeightLayout, data: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """Without what lies between them."""
    return [data[part.offset : part.offset + part.row_bytes * layout.n_rows] for part in layout.parts]


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_the_same_bytes_as_in_numpy(kind: str) -> None:
    codec = codec_by_name(kind)
    for columns in (codec.block_size, 9 * codec.block_size):
        rows = rng_of(kind, columns).randint(0, 256, (ROWS, codec.row_bytes(columns))).astype(np.uint8)
        device = EmulatedDevice()
        expected = upload(device, kind, rows, columns)
        target = device.array(np.zeros(expected.layout.n_bytes, np.uint8))
        for first, n in ((0, 3), (3, 1), (4, 3)):
            for launch in build_repack(target, expected.layout, device.array(rows[first : first + n]), first, n):
                device.launch(launch)
        found = parts_of(expected.layout, device.values(target, np.uint8))
        for ours, numpys in zip(
            found, parts_of(expected.layout, device.values(expected.buffer, np.uint8)), strict=True
        ):
            np.testing.assert_array_equal(ours, numpys)
        device.close()
