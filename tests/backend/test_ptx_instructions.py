"""Instructions as the PTX emulator runs them, against what CUTLASS's layouts, Python's integers and NumPy say of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import has_compiler
from ptx_snippets import Run, load, running, store

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="there is no g++")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with running(tmp_path) as call:
        yield call


# ---- tensor cores: CUTLASS's layouts (mma_traits_sm75.hpp, mma_traits_sm80.hpp), strides into a matrix whose first index runs
# fastest; lanes are (4, 8)
Layout = tuple[tuple[int, int], tuple[tuple[int, int], ...]]  # strides of the lane; sizes and strides of the values
C16X8: Layout = ((32, 1), ((2, 16), (2, 8)))
MMA: dict[str, tuple[int, int, int, Layout, Layout, Layout]] = {
    "m16n8k16.f16": (16, 8, 16, ((32, 1), ((2, 16), (2, 8), (2, 128))), ((16, 1), ((2, 8), (2, 64))), C16X8),
    "m16n8k8.f16": (16, 8, 8, C16X8, ((16, 1), ((2, 8),)), C16X8),
    "m16n8k32.s8": (16, 8, 32, ((64, 1), ((4, 16), (2, 8), (2, 256))), ((32, 1), ((4, 8), (2, 128))), C16X8),
    "m8n8k16.s8": (8, 8, 16, ((32, 1), ((4, 8),)), ((32, 1), ((4, 8),)), ((16, 1), ((2, 8),))),
}  # fmt: skip
MMA["m16n8k16.bf16"] = MMA["m16n8k16.f16"]


def _indices(layout: Layout) -> npt.NDArray[np.int64]:
    """Of each lane's values into the matrix, the first value of a lane in the lowest bits of its first register."""
    lanes = np.arange(32)
    base = lanes % 4 * layout[0][0] + lanes // 4 * layout[0][1]
    values = np.zeros(1, np.int64)
    for size, stride in layout[1]:
        values = (np.arange(size)[:, None] * stride + values).ravel()
    return base[:, None] + values


@pytest.mark.parametrize("name", MMA)
def test_mma_is_a_product(run: Run, name: str) -> None:
    m, n, k, a_layout, b_layout, c_layout = MMA[name]
    shape, kind = name.split(".")
    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    c: npt.NDArray[Any]
    rng = np.random.default_rng(1)
    if kind == "s8":
        a, b = (rng.integers(-128, 128, size).astype(np.int8) for size in ((m, k), (n, k)))
        c, sums = rng.integers(-1000, 1000, (m, n)).astype(np.int32), "s32"
    else:
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((m, k), (n, k)))
        c, sums = rng.normal(size=(m, n)).astype(np.float32), "f32"
        a, b = (
            (x.view(np.uint32) & 0xFFFF0000).view(np.float32) if kind == "bf16" else x.astype(np.float16)
            for x in (a, b)
        )

    def words(matrix: npt.NDArray[Any], layout: Layout) -> npt.NDArray[np.uint32]:
        values = matrix.T.ravel()[_indices(layout)]
        if values.dtype == np.float32 and kind == "bf16" and matrix is not c:
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return np.ascontiguousarray(values).view(np.uint32)

    parts = [words(a, a_layout), words(b, b_layout), words(c, c_layout)]
    counts = [part.shape[1] for part in parts]
    lists, at = [], 10
    for count in counts:
        lists.append("{" + ",".join(f"%r{at + i}" for i in range(count)) + "}")
        at += count
    result = "{" + ",".join(f"%r{30 + i}" for i in range(counts[2])) + "}"
    body = (
        load(sum(counts))
        + f"  mma.sync.aligned.{shape}.row.col.{sums}.{kind}.{kind}.{sums} {result}, {', '.join(lists)};\n"
    )
    got = run(body + store(counts[2]), np.concatenate(parts, 1))[:, : counts[2]]
    product = np.empty(m * n, c.dtype)
    product[_indices(c_layout)] = np.ascontiguousarray(got).view(c.dtype)
    expected = a.astype(np.float64) @ b.astype(np.float64).T + c
    np.testing.assert_allclose(product.reshape(n, m).T, expected, rtol=1e-6, atol=1e-6)


def test_ldmatrix(run: Run) -> None:
    """Tile i's rows are at the addresses of lanes 8 i and on; a lane gets two neighbours of a row, transposed of a column."""
    tiles = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    body = """
  mov.u32 %r2, tile;
  shl.b32 %r3, %r1, 4;
  add.s32 %r2, %r2, %r3;
  ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1];
  st.shared.v4.u32 [%r2], {%r10, %r11, %r12, %r13};
  bar.warp.sync -1;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30,%r31,%r32,%r33}, [%r2];
  ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r34,%r35,%r36,%r37}, [%r2];
"""
    got = run(body + store(8), tiles.reshape(32, 8))[:, :8]
    pairs = np.ascontiguousarray(got).view(np.uint16).reshape(32, 8, 2)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        assert (pairs[lane, :4] == tiles[:, row, column : column + 2]).all()
        assert (pairs[lane, 4:] == tiles[:, column : column + 2, row]).all()


def test_shuffles_and_votes(run: Run) -> None:
    x = np.arange(100, 132, dtype=np.uint32).reshape(32, 1)
    body = (
        load(1)
        + """
  shfl.sync.bfly.b32 %r30|%p1, %r10, 5, 31, -1;
  shfl.sync.up.b32 %r31|%p2, %r10, 3, 0, -1;
  shfl.sync.down.b32 %r32|%p3, %r10, 2, 0x181f, -1;
  shfl.sync.idx.b32 %r33, %r10, 9, 31, -1;
  selp.u32 %r34, 1, 0, %p3;
  and.b32 %r2, %r10, 1;
  setp.eq.s32 %p4, %r2, 1;
  vote.sync.ballot.b32 %r35, %p4, -1;
  redux.sync.add.s32 %r36, %r10, -1;
"""
    )
    got, lane = run(body + store(7), x)[:, :7], np.arange(32)
    assert (got[:, 0] == 100 + (lane ^ 5)).all()
    assert (got[:, 1] == 100 + np.where(lane >= 3, lane - 3, lane)).all()
    inside = lane % 8 < 6  # __shfl_down_sync with a width of 8
    assert (got[:, 2] == 100 + np.where(inside, lane + 2, lane)).all() and (got[:, 4] == inside).all()
    assert (got[:, 3] == 109).all() and (got[:, 5] == 0xAAAAAAAA).all() and (got[:, 6] == x.sum()).all()


def test_cp_async_is_seen_behind_its_wait(run: Run) -> None:
    words = np.arange(1, 32 * 4 + 1, dtype=np.uint32).reshape(32, 4)
    body = """
  mov.u32 %r2, tile;
  shl.b32 %r3, %r1, 5;
  add.s32 %r2, %r2, %r3;
  setp.eq.s32 %p1, %r1, 7;
  selp.u32 %r4, 8, 16, %p1;
  cp.async.cg.shared.global [%r2], [%rd1], 16, %r4;
  cp.async.commit_group;
  cp.async.ca.shared.global [%r2+16], [%rd1+4], 4;
  cp.async.commit_group;
  cp.async.wait_group 1;
  ld.shared.v4.u32 {%r30, %r31, %r32, %r33}, [%r2];
  ld.shared.u32 %r34, [%r2+16];
  cp.async.wait_all;
  ld.shared.u32 %r35, [%r2+16];
"""
    got = run(body + store(6), words)[:, :6]
    expected = words.copy()
    expected[7, 2:] = 0  # of lane 7 only 8 bytes were read
    assert (got[:, :4] == expected).all() and (got[:, 4] == 0xFFFFFFFF).all() and (got[:, 5] == words[:, 1]).all()


def test_conversions(run: Run) -> None:
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(32, 1)) * 10.0 ** rng.uniform(-9, 11, (32, 1))).astype(np.float32)
    x[:8, 0] = 2.5, -2.5, 65520.0, 3e9, -3e9, np.nan, 5.9604645e-08 / 2, 0.49999997
    body = (
        load(1)
        + """
  mov.b32 %f1, %r10;
  cvt.rn.f16.f32 %rs1, %f1;
  cvt.u32.u16 %r30, %rs1;
  cvt.f32.f16 %f2, %rs1;
  mov.b32 %r31, %f2;
  cvt.rni.s32.f32 %r32, %f1;
  cvt.rzi.s32.f32 %r33, %f1;
  cvt.rmi.s32.f32 %r34, %f1;
  cvt.sat.f32.f32 %f3, %f1;
  mov.b32 %r35, %f3;
  cvt.rn.bf16x2.f32 %r36, %f1, %f1;
  cvt.s16.s8 %rs2, %rs1;
  cvt.s32.s16 %r37, %rs2;
  cvt.rzi.u32.f32 %r38, %f1;
"""
    )
    got = run(body + store(9), x)
    with np.errstate(over="ignore"):
        half = x[:, 0].astype(np.float16)
    plain = ~np.isnan(x[:, 0])
    assert (got[plain, 0] == half.view(np.uint16)[plain]).all()
    assert (got[plain, 1].view(np.float32) == half.astype(np.float32)[plain]).all()
    for column, function in ((2, np.rint), (3, np.trunc), (4, np.floor)):
        clamped = np.clip(function(x[:, 0].astype(np.float64)), -(2**31), 2**31 - 1)
        assert (got[:, column].view(np.int32) == np.where(plain, clamped, 0)).all()
    assert (got[:, 8] == np.where(plain, np.clip(np.trunc(x[:, 0].astype(np.float64)), 0, 2**32 - 1), 0)).all()
    assert (got[:, 5].view(np.float32) == np.where(plain, np.clip(x[:, 0], 0, 1), 0)).all()
    bits = x[:, 0].view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint32)
    assert (got[plain, 6] == (rounded << 16 | rounded)[plain]).all()
    assert (got[plain, 7].view(np.int32) == (half.view(np.int8)[::2])[plain]).all()


def test_bits_and_integers(run: Run) -> None:
    words = np.random.default_rng(3).integers(0, 1 << 32, (32, 3), np.uint32)
    words[0], words[1] = (0x80000000, 0xFFFFFFFF, 40), (0, 1, 0)
    body = (
        load(3)
        + """
  lop3.b32 %r30, %r10, %r11, %r12, 0x6a;
  prmt.b32 %r31, %r10, %r11, 0x9d60;
  bfe.s32 %r32, %r10, 5, 9;
  bfi.b32 %r33, %r11, %r10, 12, 8;
  mul.hi.s32 %r34, %r10, %r11;
  shf.l.wrap.b32 %r35, %r10, %r11, %r12;
  shl.b32 %r36, %r10, %r12;
  shr.s32 %r37, %r10, %r12;
  dp4a.s32.u32 %r38, %r10, %r11, %r12;
  mad.lo.s32 %r39, %r10, %r11, %r12;
  mul.wide.s32 %rd5, %r10, %r11;
  mov.b64 {%r2, %r3}, %rd5;
  bfind.shiftamt.u32 %r4, %r10;
  brev.b32 %r5, %r10;
  st.global.v4.u32 [%rd2+48], {%r2, %r3, %r4, %r5};
"""
    )
    got = run(body + store(10), words)

    def signed(v: int, n: int = 32) -> int:
        return v - (1 << n) if v >> (n - 1) else v

    for lane in range(32):
        a, b, c = (int(v) for v in words[lane])
        sources = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
        signs = [255 if byte & 128 else 0 for byte in sources]
        assert got[lane, 0] == (a & b) ^ c
        assert int(got[lane, 1]).to_bytes(4, "little") == bytes([sources[0], sources[6], signs[5], signs[1]])
        assert got[lane, 2] == signed(a >> 5 & 511, 9) % 2**32
        assert got[lane, 3] == (a & ~(255 << 12)) | (b & 255) << 12
        assert got[lane, 4] == (signed(a) * signed(b) >> 32) % 2**32
        assert got[lane, 5] == ((b << 32 | a) << (c & 31) >> 32) % 2**32
        assert got[lane, 6] == (a << c) % 2**32 if c < 32 else got[lane, 6] == 0
        assert got[lane, 7] == (signed(a) >> min(c, 31)) % 2**32
        assert (
            got[lane, 8] == (sum(signed(x, 8) * y for x, y in zip(sources[:4], sources[4:], strict=True)) + c) % 2**32
        )
        assert got[lane, 9] == (a * b + c) % 2**32
        assert int(got[lane, 12]) | int(got[lane, 13]) << 32 == signed(a) * signed(b) % 2**64
        assert got[lane, 14] == (32 - a.bit_length() if a else 0xFFFFFFFF)
        assert got[lane, 15] == int(f"{a:032b}"[::-1], 2)


def test_float_arithmetic(run: Run) -> None:
    words = np.random.default_rng(4).normal(size=(32, 2)).astype(np.float32)
    words[0], words[1], words[2] = (np.nan, 1), (-0.0, 0.0), (1e-39, 1)
    body = (
        load(2)
        + """
  mov.b32 %f1, %r10;
  mov.b32 %f2, %r11;
  max.f32 %f3, %f1, %f2;
  min.f32 %f4, %f1, %f2;
  mul.ftz.f32 %f5, %f1, %f2;
  ex2.approx.ftz.f32 %f6, %f1;
  fma.rn.f32 %f7, %f1, %f2, %f1;
  fma.rm.f32 %f8, %f1, %f2, %f1;
  setp.gtu.f32 %p1, %f1, %f2;
  setp.gt.f32 %p2, %f1, %f2;
  selp.u32 %r36, 1, 0, %p1;
  selp.u32 %r37, 1, 0, %p2;
"""
        + "".join(f"  mov.b32 %r{27 + i}, %f{i};\n" for i in range(3, 9))
    )
    got = run(body + store(8), words)
    a, b = words.T
    values = got.view(np.float32)
    assert (values[:, 0] == np.fmax(a, b)).all() and (values[:, 1] == np.fmin(a, b)).all()
    assert got[1, 0] == 0 and got[1, 1] == 0x80000000 and values[2, 2] == 0
    np.testing.assert_allclose(values[1:, 3], np.exp2(np.where(abs(a) < 1e-38, 0, a))[1:], rtol=1e-6)
    with np.errstate(invalid="ignore"):
        exact = a.astype(np.float64) * b + a
    nearest = exact.astype(np.float32)
    assert (values[3:, 4] == nearest[3:]).all()
    below = np.where(nearest.astype(np.float64) > exact, np.nextafter(nearest, np.float32(-math.inf)), nearest)
    assert (values[3:, 5] == below[3:]).all()
    assert got[0, 6] == 1 and got[0, 7] == 0 and (got[1:, 6] == (a > b)[1:]).all() and (got[1:, 7] == (a > b)[1:]).all()


def test_arithmetic_of_pairs_of_halves(run: Run) -> None:
    words = np.random.default_rng(5).normal(size=(32, 6)).astype(np.float16)
    words[0] = 60000, -60000, 2, 2, 1, 1
    body = load(3) + "  fma.rn.f16x2 %r30, %r10, %r11, %r12;\n  add.f16x2 %r31, %r10, %r11;\n"
    got = np.ascontiguousarray(run(body + store(2), words)[:, :2]).view(np.float16)
    a, b, c = (words[:, i : i + 2].astype(np.float64) for i in (0, 2, 4))
    with np.errstate(over="ignore"):
        assert (got[:, :2] == (a * b + c).astype(np.float16)).all() and (got[:, 2:] == (a + b).astype(np.float16)).all()
