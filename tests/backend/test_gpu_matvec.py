"""`gemv.cu` for every weight type and 1 to 8 rows, on emulated threads, against float64 over the codec's weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from cpu_kernels import F32, dequantized, random_blocks, rng_of
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import operand, rows_of_x, upload

from pyinfer.kernels_gpu.matvec import Product, build_matvec, gemv_kernel
from pyinfer.kernels_gpu.matvec_tuning import (
    STATIC_SHARED_BYTES,
    TUNED,
    Problem,
    Tuning,
    default_tuning,
    neighbours,
    step_columns,
    tile_bytes,
)
from pyinfer.kernels_gpu.sources import SOURCES
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES, KINDS
from pyinfer.quant.codecs import codec_by_name

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]

ARCH, SMS = 90, 4
NARROW = Tuning(lanes=8, split=2, rows=2, depth=3, passes=3, warps=4, min_blocks=4)
# what 8 rows and 8 lanes, the first of several passes and the last of a matrix, all look like
TUNINGS = {
    "one": Tuning(32, 1, 1, 2, 1, 4, 8),
    "narrow": NARROW,
    "split": Tuning(16, 4, 1, 4, 2, 8, 4),
    "rows": Tuning(16, 1, 4, 2, 1, 4, 3),
    "no ring": Tuning(32, 2, 2, 1, 2, 4, 4),
}


class Case:
    """Matrices of some types that read the same x, with their oracle."""

    def __init__(self, kinds: Sequence[str], rows: Sequence[int], columns: int) -> None:
        self.kinds, self.rows, self.columns = tuple(kinds), tuple(rows), columns
        rng = rng_of(self.kinds, self.rows, columns)
        self.data = [random_blocks(kind, n, columns, rng) for kind, n in zip(kinds, rows, strict=True)]
        self.x = rows_of_x(8, columns, rng)
        self.biases = [rng.standard_normal(n).astype(np.float32) for n in rows]
        self.residual = rng.standard_normal((8, rows[0])).astype(np.float32)

    def run(
        self,
        n_tokens: int,
        tuning: Tuning | None = None,
        *,
        bias: bool = False,
        residual: bool = False,
        descending: bool = False,
    ) -> list[F32]:
        """What the kernel makes of the first rows of x, checked against float64; the residual is updated in place."""
        device = EmulatedDevice(descending=descending, n_sms=SMS)
        x, exact = operand(device, self.x[:n_tokens], "f32" if self.kinds[0] in FLOAT_BYTES else "a8")
        outs = [device.empty(n_tokens, n) for n in self.rows]
        if residual:
            outs = [device.array(self.residual[:n_tokens])]
        products = [
            Product(upload(device, kind, data, self.columns), out, device.array(b) if bias else None)
            for kind, data, out, b in zip(self.kinds, self.data, outs, self.biases, strict=True)
        ]
        for launch in build_matvec(
            x, products, n_tokens, n_sms=SMS, arch=ARCH, residual=outs[0] if residual else None, tuning=tuning
        ):
            device.launch(launch)
        results = [device.values(out, np.float32, n_tokens, n).copy() for out, n in zip(outs, self.rows, strict=True)]
        device.close()
        for kind, data, b, y in zip(self.kinds, self.data, self.biases, results, strict=True):
            weights = dequantized(kind, data)
            expected, size = exact @ weights.T, np.abs(exact) @ np.abs(weights).T
            if bias:
                expected, size = expected + b, size + np.abs(b)
            if residual:
                expected, size = expected + self.residual[:n_tokens], size + np.abs(self.residual[:n_tokens])
            assert np.isfinite(y).all()
            # float32 sums of products that are exact or rounded once or twice
            assert (np.abs(y - expected) <= 2e-6 * size + 1e-30).all(), (np.abs(y - expected) / size).max()
            assert np.linalg.norm(y - expected) <= 2e-3 * np.linalg.norm(expected)
        return results


def columns_of(kind: str) -> tuple[int, ...]:
    """A row of one block, odd numbers of blocks, more than one round of a warp."""
    return {256: (256, 768, 2304), 32: (32, 288, 640, 1184), 1: (32, 77, 288, 576)}[codec_by_name(kind).block_size]


def compile_at_once(cases: Sequence[Case], tokens: Sequence[int], tunings: Sequence[Tuning | None] = (None,)) -> None:
    """All variants of a test on all cores, instead of one after the other."""
    problems = [Problem(case.kinds, sum(case.rows), case.columns, n) for case in cases for n in tokens]
    EmulatedDevice().prepare(
        [gemv_kernel(problem, cut or default_tuning(problem, SMS, ARCH)) for problem in problems for cut in tunings]
    )


def check_numbers_of_rows(kind: str, tokens: Sequence[int]) -> None:
    """Each within its bounds, and each row of x with the same bits however many others there are."""
    case = Case((kind,), (70,), columns_of(kind)[1])
    longest = case.run(8, bias=True)[0]
    for n in tokens:
        np.testing.assert_array_equal(case.run(n, bias=True)[0], longest[:n])


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_at_once([Case((kind,), (70,), columns_of(kind)[1]) for kind in KINDS], (1, 8))
    compile_at_once(
        [Case((kind,), (1,), columns) for kind in KINDS for columns in columns_of(kind)[::2]], (3,), [NARROW]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind: str) -> None:
    check_numbers_of_rows(kind, (1,))


@pytest.mark.parametrize("kind", ["Q4_K", "F16", pytest.param("others", marks=pytest.mark.large)])
def test_every_number_of_rows(kind: str) -> None:
    for k in KINDS if kind == "others" else (kind,):
        check_numbers_of_rows(k, range(1, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str) -> None:
    """Rows and columns that fill no warp, no round, no block, and several passes."""
    for columns in columns_of(kind)[::2]:
        for rows in (1, 5, 37, 131):
            Case((kind,), (rows,), columns).run(3, NARROW, residual=rows > 5, bias=rows == 37)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "Q2_K", "F32"])
def test_tunings(kind: str, tuning: Tuning) -> None:
    case = Case((kind,), (61,), columns_of(kind)[2])
    for n_tokens in (1, 5):
        y = case.run(n_tokens, tuning, bias=True)[0]
        np.testing.assert_array_equal(case.run(n_tokens, tuning, bias=True, descending=True)[0], y)


@pytest.mark.parametrize(
    "kinds",
    [
        ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q6_K", "Q4_K"), ("Q6_K", "Q4_K", "Q4_K"), ("Q5_K", "Q3_K"),
        ("Q4_0", "Q8_0", "Q5_1"), ("F16", "F32", "BF16"), ("Q5_0",) * 5,
    ],
    ids="-".join,
)  # fmt: skip
def test_matrices_of_one_input(kinds: tuple[str, ...]) -> None:
    """Each gives what it gives alone, in the same bits."""
    rows = (48, 7, 35, 1, 20)[: len(kinds)]
    case = Case(kinds, rows, 768)
    for tuning in (NARROW, None):
        case.run(2, tuning, bias=True)
    together = case.run(2, NARROW)
    for i, kind in enumerate(kinds):
        alone = Case((kind,), (rows[i],), 768)
        alone.data, alone.x = [case.data[i]], case.x
        np.testing.assert_array_equal(alone.run(2, NARROW)[0], together[i])


def test_a_scale_that_is_not_finite_stays_in_its_row() -> None:
    case = Case(("Q4_K",), (37,), 768)
    block = case.data[0].reshape(37, 3, 144)
    block[11, 1, :2] = np.float16(np.nan).reshape(1).view(np.uint8)
    device = EmulatedDevice(n_sms=SMS)
    x, _ = operand(device, case.x[:1], "a8")
    out = device.empty(1, 37)
    (launch,) = build_matvec(
        x, [Product(upload(device, "Q4_K", case.data[0], 768), out)], 1, n_sms=SMS, arch=ARCH, tuning=NARROW
    )
    device.launch(launch)
    finite = np.isfinite(device.values(out, np.float32, 37))
    assert not finite[11] and finite.sum() == 36
    device.close()


# ---- tunings, without a kernel
PROBLEMS = [
    Problem(kinds, rows, columns, 1)
    for kinds in (("Q4_K",), ("Q4_K", "Q4_K", "Q6_K"), ("Q8_0",), ("Q5_K", "Q5_K"), ("F32",), ("F16",), ("Q2_K",))
    for rows, columns in (
        (1, 256),
        (576, 1536),
        (2048, 2048),
        (6144, 4096),
        (4096, 14336),
        (28672, 4096),
        (128256, 8192),
    )
]


@pytest.mark.parametrize("arch, n_sms", [(75, 40), (80, 108), (86, 28), (89, 128), (90, 132)])
def test_defaults_fit_every_gpu_and_add_in_one_order(arch: int, n_sms: int) -> None:
    for problem in PROBLEMS:
        tunings = [default_tuning(replace(problem, n_tokens=n), n_sms, arch) for n in range(1, 9)]
        assert len({(t.lanes, t.split) for t in tunings}) == 1
        for n, tuning in enumerate(tunings, start=1):
            assert tuning.shared_bytes(replace(problem, n_tokens=n)) <= STATIC_SHARED_BYTES
            assert tuning.warps % tuning.split == 0 and (tuning.depth == 1 if arch < 80 else 2 <= tuning.depth <= 8)
            assert tuning.n_blocks(problem.n_rows) * tuning.passes * tuning.block_rows >= problem.n_rows


def test_neighbours_fit_and_keep_the_order_of_more_tokens() -> None:
    for problem in PROBLEMS:
        for n in (1, 5):
            more = replace(problem, n_tokens=n)
            start = default_tuning(more, SMS, ARCH)
            others = list(neighbours(start, more, ARCH))
            assert len(others) >= 6 and len(set(others)) == len(others) and start not in others
            assert all(t.shared_bytes(more) <= STATIC_SHARED_BYTES and t.warps % t.split == 0 for t in others)
            orders = {(t.lanes, t.split) for t in others}
            assert (len(orders) > 1) == (n == 1)


def test_measured_tunings_add_in_one_order() -> None:
    for tunings in TUNED.values():
        assert len({(t.lanes, t.split) for t in tunings}) == 1


def test_sizes_agree_with_the_kernels() -> None:
    for kind in KINDS:
        text = (SOURCES / f"weight_{'float' if kind in FLOAT_BYTES else kind.lower()}.cuh").read_text()
        found = re.search(r"kTileBytes = (\d+)", text)
        assert found and int(found[1]) == tile_bytes(kind), kind
        if kind not in FLOAT_BYTES:
            found = re.search(r"kColumns = (\d+)", text)
            assert found and int(found[1]) == step_columns(kind), kind
