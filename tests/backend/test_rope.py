"""Rotary embedding on every ISA against float64, and the tables that it reads."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import F32, ISAS, Guarded, call, compiler, padded_rows, rng_of, step_header

from pyinfer.graph.rope import Rope
from pyinfer.kernels_cpu.rope_kernel import RopeArg, rope_body
from pyinfer.kernels_cpu.rope_tables import RopeTables

pytestmark = pytest.mark.backend

Pairing = Literal["interleaved", "half"]
BY_ISA = pytest.mark.parametrize("isa", ISAS)
POSITIONS = np.array([0, 1, 5, 5, 999, 1024, 1500], np.int32)
N_HEADS = 3


def exact(x: F32, head_dim: int, n_dims: int, pairing: Pairing) -> npt.NDArray[np.float64]:
    """A pair is a complex number, turned by position * 10000^(-2i / n_dims)."""
    heads = x.astype(np.float64).reshape(len(x), -1, head_dim)
    turned = heads[..., :n_dims]
    half = n_dims // 2
    pairs = turned.reshape(*turned.shape[:2], half, 2) if pairing == "interleaved" else (
        np.stack([turned[..., :half], turned[..., half:]], axis=-1)
    )  # fmt: skip
    angles = POSITIONS[:, None] * 10000.0 ** (-np.arange(0, n_dims, 2) / n_dims)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    out = heads.copy()
    if pairing == "interleaved":
        out[..., 0:n_dims:2], out[..., 1:n_dims:2] = z.real, z.imag
    else:
        out[..., :half], out[..., half:n_dims] = z.real, z.imag
    return out.reshape(x.shape)


def run(isa: str, x: F32, head_dim: int, n_dims: int, pairing: Pairing, *, in_place: bool) -> F32:
    rope = Rope(n_dims, pairing, 10000.0)
    tables = RopeTables(n_ctx=1501)
    table = tables.address(rope)
    tables.cover(int(POSITIONS.max()))
    source, stride = padded_rows(x)
    out = source if in_place else Guarded(stride * len(x), 0xFF)
    arguments = {
        RopeArg.X: source.address, RopeArg.X_STRIDE: stride, RopeArg.OUT: out.address, RopeArg.OUT_STRIDE: stride,
        RopeArg.TABLE: table, RopeArg.N_HEADS: x.shape[1] // head_dim,
    }  # fmt: skip
    step = step_header(positions=POSITIONS.ctypes.data, n_tokens=len(x))
    kernel = compiler(isa).kernel(f"rope_{head_dim}_{n_dims}_{pairing}", rope_body(head_dim, n_dims, pairing))
    call(kernel, arguments, step, len(x), cuts=(2, 3))
    source.check()
    out.check()
    return out.floats(len(x))[:, : x.shape[1]].copy()


@BY_ISA
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize(
    "head_dim, n_dims",
    [(16, 16), (48, 48), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 32), (80, 20), (128, 96), (32, 6)],
)
def test_rope_turns_every_head(isa: str, pairing: Pairing, head_dim: int, n_dims: int) -> None:
    x = rng_of("rope", head_dim).standard_normal((len(POSITIONS), N_HEADS * head_dim)).astype(np.float32)
    expected = exact(x, head_dim, n_dims, pairing)
    for in_place in (False, True):
        result = run(isa, x, head_dim, n_dims, pairing, in_place=in_place)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
        rest = np.arange(x.shape[1]) % head_dim >= n_dims
        np.testing.assert_array_equal(result[:, rest], x[:, rest])
        np.testing.assert_array_equal(result[0], x[0])  # position 0 turns nothing


def test_tables_fill_as_positions_come() -> None:
    tables, rope = RopeTables(n_ctx=3000), Rope(8, "half", 500.0)
    tables.address(rope)
    table = tables._tables[id(rope)][1]
    assert table.shape[0] >= 3000
    tables.cover(1023)
    assert (table[1023, 0] != 0).all() and (table[1024:] == 0).all()
    tables.cover(2999)
    np.testing.assert_array_equal(table[:3000].transpose(0, 2, 1), rope.cos_sin(np.arange(3000)))
