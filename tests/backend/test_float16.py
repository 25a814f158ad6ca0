"""The emitter's conversions between float16 and float32 on every ISA, against NumPy's, for every float16 there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import F32, ISAS, Guarded, call, compiler, hash_of, step_header

from pyinfer.kernels_cpu.opcode import OpField

pytestmark = pytest.mark.backend

BY_ISA = pytest.mark.parametrize("isa", ISAS)
_SOURCE, _TARGET = OpField.ARGS, OpField.ARGS + 1
_VERSION = f"{hash_of(Path(__file__).read_text()):x}"  # compiled kernels are kept by name
EVERY = np.arange(65536, dtype=np.uint16)
NORMAL = EVERY[np.isfinite(EVERY.view(np.float16))]


def _to_float(e: Any, op: Any, step: Any, first: Any, last: Any, scratch: Any) -> None:
    source, target = (e.ptr(e.field(op, i)) for i in (_SOURCE, _TARGET))
    with e.loop(last, first) as i:
        e.store(e.load_halves(e.at(source, e.mul(i, 2 * e.L))), e.at(target, e.mul(i, 4 * e.L)), 4)


def _to_half(e: Any, op: Any, step: Any, first: Any, last: Any, scratch: Any) -> None:
    source, target = (e.ptr(e.field(op, i)) for i in (_SOURCE, _TARGET))
    with e.loop(last, first) as i:
        value = e.load(e.at(source, e.mul(i, 4 * e.L)), e.vf, 4)
        e.store(e.float_to_half(value), e.at(target, e.mul(i, 2 * e.L)), 2)


def convert(isa: str, name: str, body: Any, x: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """All elements of x, padded with zeros to whole vectors."""
    lanes = compiler(isa).isa.lanes
    n = -(-len(x) // lanes) * lanes
    source = np.zeros(n, x.dtype)
    source[: len(x)] = x
    out = Guarded(n * np.dtype(dtype).itemsize)
    arguments = {_SOURCE: source.ctypes.data, _TARGET: out.address}
    call(compiler(isa).kernel(f"{name}_{_VERSION}", body), arguments, step_header(), n // lanes)
    out.check()
    return out.bytes.view(dtype)[: len(x)]


def halves_of(isa: str, x: F32) -> npt.NDArray[np.uint16]:
    return convert(isa, "test_float_to_half", _to_half, x, np.uint16)


@BY_ISA
def test_every_half_widens_exactly(isa: str) -> None:
    floats = convert(isa, "test_half_to_float", _to_float, NORMAL, np.float32)
    expected = NORMAL.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(floats.view(np.uint32), expected.view(np.uint32))  # the sign of zero too


@BY_ISA
def test_every_half_comes_back(isa: str) -> None:
    np.testing.assert_array_equal(halves_of(isa, NORMAL.view(np.float16).astype(np.float32)), NORMAL)


@BY_ISA
def test_floats_between_two_halves_round_half_to_even(isa: str) -> None:
    magnitudes = np.sort(NORMAL[NORMAL < 0x8000]).view(np.float16).astype(np.float32)
    middle = (magnitudes[:-1] + magnitudes[1:]) / 2  # exact in float32
    x = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))])
    for signed in (x, -x):
        np.testing.assert_array_equal(halves_of(isa, signed), signed.astype(np.float16).view(np.uint16))


@BY_ISA
def test_random_floats(isa: str) -> None:
    bits = np.random.RandomState(0).randint(0, 2**32, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.abs(x) <= 65504]  # NaN compares false
    assert len(x) > 50_000
    np.testing.assert_array_equal(halves_of(isa, x), x.astype(np.float16).view(np.uint16))
