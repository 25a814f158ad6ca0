"""Tensor-core matmuls on the emulator: every type against float64 over the codec's weights, and every way to cut the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu.kernel_cache import unit_text
from pyinfer.kernels_gpu.launch import Buffer, Gemm
from pyinfer.kernels_gpu.matmul import (
    MatmulMemory,
    arrival_bytes,
    build_gemm,
    build_matmul,
    build_mma,
    gain_of,
    mma_kernel,
    problems_of,
    scratch_bytes,
)
from pyinfer.kernels_gpu.matmul_route import Problem, Route, default_route
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.mma_tiling import GPU, MMA_KINDS, Tiling, chunk_units, model_cycles, tilings
from pyinfer.kernels_gpu.nvrtc import load_nvrtc, read_resources
from pyinfer.kernels_gpu.operand import Operand
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import layout_of, pack
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
F32Array = npt.NDArray[np.float32]
SMALL = GPU(90, 4, 227 << 10)
TOLERANCE = 2e-3  # float16 weights: 7e-4 is what Q4_K comes to
BY_KIND = pytest.mark.parametrize("kind", MMA_KINDS)
WIDE = {True: ((72, 256, 9), (200, 512, 33)), False: ((72, 288, 16), (130, 576, 100), (40, 640, 33), (70, 1024, 9))}


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


@dataclass
class Case:
    """One x and the matrices that it is multiplied with."""

    x: Operand
    problem: Problem
    products: list[Product]
    expected: list[F32Array]
    weights: list[F32Array]
    biases: list[F32Array]


def make(
    device: EmulatedDevice,
    kind: str,
    m: int,
    widths: Sequence[int],
    columns: int,
    *,
    bias: bool = False,
    magnitude: float = 0.02,
) -> Case:
    """Random weights and rows; some rows have a scale of their own. Expected values are float64's."""
    rng = np.random.default_rng(m * columns + sum(widths))
    scales = np.exp2(rng.integers(-3, 4, m)).astype(np.float32)
    halves = rng.standard_normal((m, columns)).astype(np.float16)
    x = Operand("h16", columns, device.array(halves), device.array(scales))
    products, expected, matrices, biases = [], [], [], []
    for n in widths:
        codec = codec_by_name(kind)
        values = rng.standard_normal((n, columns)).astype(np.float32) * np.float32(magnitude)
        tensor = QuantTensor("w", codec, (n, columns), codec.quantize(values))
        layout = layout_of(kind, n, columns)
        weight = DeviceWeight(layout, device.alloc(layout.n_bytes))
        for offset, part in pack(tensor):
            device.upload(weight.buffer, np.ascontiguousarray(part), offset)
        added = rng.standard_normal(n).astype(np.float32) * np.float32(bias)
        matrices.append(tensor.dequantize())
        biases.append(added)
        products.append(Product(weight, device.empty(m, n), device.array(added) if bias else None))
        exact = (halves.astype(np.float64) * scales[:, None]) @ matrices[-1].astype(np.float64).T
        expected.append((exact + added).astype(np.float32))
    (problem, same) = problems_of(products, m)[0]
    assert same == products
    return Case(x, problem, products, expected, matrices, biases)


def memory_for(device: EmulatedDevice, case: Case, n_scratch: int, n_arrivals: int) -> MatmulMemory:
    return MatmulMemory(device.alloc(n_scratch), device.array(np.zeros(n_arrivals // 4, np.int32)), {})


def run_mma(device: EmulatedDevice, case: Case, cut: Tiling, residual: Buffer | None = None) -> None:
    """Twice: what the first launch leaves behind must serve the second."""
    problem = case.problem
    n_blocks = cut.n_blocks(problem.m, problem.widths, problem.columns)
    n_tiles = cut.n_tiles(problem.m, problem.widths)
    memory = memory_for(device, case, n_blocks * cut.partial_bytes, 4 * n_tiles)
    for _ in range(1 if residual else 2):
        for step in build_mma(case.x, problem, case.products, memory, cut, residual=residual):
            device.launch(step)
    assert not device.values(memory.arrivals, np.int32).any()


def check(device: EmulatedDevice, case: Case, tolerance: float = TOLERANCE) -> None:
    for product, expected in zip(case.products, case.expected, strict=True):
        got = device.values(product.out, np.float32, *expected.shape)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        assert error <= tolerance, error
        assert np.abs(got - expected).max() <= 20 * tolerance * np.abs(expected).max()


def cut_of(case: Case, **changes: int) -> Tiling:
    """A small tiling that the tests vary."""
    units = chunk_units(case.problem.kind, case.problem.columns)
    fields = {
        "rows": 16, "fragments": 1, "warps": 2, "chunk_units": units, "x_columns": 64, "w_stages": 2, "x_stages": 2,
        "blocks": 1, "units_per_block": 3,
    }  # fmt: skip
    return Tiling(**(fields | changes))


@BY_KIND
def test_every_type(device: EmulatedDevice, kind: str) -> None:
    """Ragged rows and columns, shares that end in the middle of a tile."""
    for n, columns, m in WIDE[kind.endswith("_K")]:
        case = make(device, kind, m, (n,), columns, bias=True)
        run_mma(device, case, cut_of(case))
        check(device, case)


@BY_KIND
def test_small_scales_keep_their_digits(device: EmulatedDevice, kind: str) -> None:
    """Weights around 1e-4: their blocks' scales are below what float16 holds in full."""
    case = make(device, kind, 8, (32,), 256, magnitude=1e-4)
    run_mma(device, case, cut_of(case))
    check(device, case)


CUTS: dict[str, dict[str, int]] = {
    "two rows of fragments": {"fragments": 2},
    "four warps": {"warps": 4, "fragments": 2},
    "one unit a block": {"units_per_block": 1},
    "several tiles a block": {"units_per_block": 11},
    "all in one block": {"units_per_block": 1000},
    "deep rings": {"w_stages": 4, "x_stages": 4},
    "wide stages of x": {"x_columns": 128, "w_stages": 3, "x_stages": 3},
    "one stage of x a chunk": {"x_columns": 256, "w_stages": 3, "x_stages": 3},
    "tall tile": {"rows": 64},
    "the largest tile": {"rows": 128, "fragments": 2, "warps": 8, "x_stages": 4},
    "64 weight rows a warp": {"rows": 32, "fragments": 4, "warps": 4, "x_stages": 4},
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("descending", (False, True))
def test_every_cut(name: str, descending: bool) -> None:
    """Three matrices, tiles of x one after another; blocks in either order."""
    device = EmulatedDevice(descending=descending)
    case = make(device, "Q4_K", 40, (72, 40, 8), 768, bias=True)
    run_mma(device, case, cut_of(case, **CUTS[name]))
    check(device, case)
    device.close()


def test_residual_in_place(device: EmulatedDevice) -> None:
    case = make(device, "Q6_K", 20, (48,), 512, bias=True)
    before = np.random.default_rng(3).standard_normal((20, 48)).astype(np.float32)
    device.upload(case.products[0].out, before)
    case.expected[0] += before
    run_mma(device, case, cut_of(case, units_per_block=1), residual=case.products[0].out)
    check(device, case)


@BY_KIND
def test_float16_and_cublas(device: EmulatedDevice, kind: str) -> None:
    """Slices that do not divide the matrix; a residual beside the result."""
    case = make(device, kind, 12, (50,), 256, bias=True, magnitude=1e-3)
    beside = np.random.default_rng(3).standard_normal((12, 50)).astype(np.float32)
    case.expected[0] += beside
    memory = memory_for(device, case, scratch_bytes(case.problem, Route(20), SMALL), 4)
    for step in build_gemm(case.x, case.problem, case.products, memory, 20, residual=device.array(beside)):
        device.launch(step)
    check(device, case)


@pytest.mark.parametrize("columns", [96, 95])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_is_multiplied_as_float32(device: EmulatedDevice, columns: int, bias: bool) -> None:
    """No digit is lost to a narrower type; rows of weights that are padded; several matrices of one x."""
    case = make(device, "F32", 12, (50, 24), columns, bias=bias)
    rows = np.random.default_rng(5).standard_normal((12, columns)).astype(np.float32)
    case.x = Operand("f32", columns, device.array(rows))
    route = default_route(case.problem, SMALL, is_float16=False)
    assert route.slice_rows
    memory = memory_for(device, case, max(1, scratch_bytes(case.problem, Route(20), SMALL)), 4)
    steps = build_gemm(case.x, case.problem, case.products, memory, 20)
    assert all(step.kind == "f32" for step in steps if isinstance(step, Gemm)) and len(steps) == (10 if bias else 5)
    for step in steps:
        device.launch(step)
    exact = rows.astype(np.float64)
    case.expected = [
        (exact @ weights.astype(np.float64).T + added).astype(np.float32)
        for weights, added in zip(case.weights, case.biases, strict=True)
    ]
    check(device, case, 1e-6)


def test_nothing_is_left_to_do_without_scales(device: EmulatedDevice) -> None:
    """Rows that are float16 by themselves, no bias: cuBLAS writes the result; both ways agree."""
    case = make(device, "Q5_0", 12, (50,), 96)
    rows = device.values(case.x.data, np.float16, 12, 96).astype(np.float32)
    assert case.x.scales is not None
    case.expected[0] = case.expected[0] / device.values(case.x.scales, np.float32, 12, 1)
    case.x = Operand("h16", 96, device.array(rows.astype(np.float16)))
    memory = memory_for(device, case, scratch_bytes(case.problem, Route(20), SMALL), 4)
    steps = build_gemm(case.x, case.problem, case.products, memory, 20)
    assert len(steps) == 6
    for step in steps:
        device.launch(step)
    check(device, case)
    run_mma(device, case, cut_of(case))
    check(device, case)


def test_a_residual_is_added_by_cublas(device: EmulatedDevice) -> None:
    """Into rows that are there already; nothing is left to do then either."""
    case = make(device, "Q8_0", 12, (50,), 96)
    before = np.random.default_rng(3).standard_normal((12, 50)).astype(np.float32)
    assert case.x.scales is not None
    case.expected[0] = case.expected[0] / device.values(case.x.scales, np.float32, 12, 1) + before
    case.x = Operand("h16", 96, case.x.data)
    out = case.products[0].out
    device.upload(out, before)
    memory = memory_for(device, case, scratch_bytes(case.problem, Route(20), SMALL), 4)
    steps = build_gemm(case.x, case.problem, case.products, memory, 20, residual=out)
    assert sum(isinstance(step, Gemm) for step in steps) == 3 and len(steps) == 6
    for step in steps:
        device.launch(step)
    check(device, case)


def test_results_in_float16(device: EmulatedDevice) -> None:
    case = make(device, "Q4_K", 12, (50, 24), 256)
    assert case.x.scales is not None
    scales = device.values(case.x.scales, np.float32, 12, 1)
    case.x = Operand("h16", 256, case.x.data)
    outs = [device.empty(12, n, dtype=np.float16) for n in case.problem.widths]
    products = [Product(product.weight, out) for product, out in zip(case.products, outs, strict=True)]
    memory = memory_for(device, case, scratch_bytes(case.problem, Route(20), SMALL), 4)
    for step in build_matmul(case.x, case.problem, products, Route(20), memory, SMALL, halves=True):
        device.launch(step)
    for out, expected in zip(outs, case.expected, strict=True):
        got, exact = device.values(out, np.float16, *expected.shape), expected / scales
        assert np.linalg.norm(got - exact) <= TOLERANCE * np.linalg.norm(exact)


def test_a_kept_copy_is_multiplied(device: EmulatedDevice) -> None:
    case = make(device, "Q8_0", 12, (64,), 96)
    copy = np.random.default_rng(4).standard_normal((64, 96)).astype(np.float16)
    memory = memory_for(device, case, scratch_bytes(case.problem, Route(64), SMALL), 4)
    memory = MatmulMemory(memory.scratch, memory.arrivals, {case.products[0].weight.buffer.ptr: device.array(copy)})
    steps = build_matmul(case.x, case.problem, case.products, Route(64), memory, SMALL)
    assert [type(step) for step in steps if isinstance(step, Gemm)] and len(steps) == 2
    for step in steps:
        device.launch(step)
    x, scales = case.x.data, case.x.scales
    assert scales is not None
    rows = device.values(x, np.float16, 12, 96).astype(np.float32) * device.values(scales, np.float32, 12, 1)
    case.expected[0] = rows @ copy.astype(np.float32).T / np.float32(gain_of("Q8_0"))
    check(device, case)


def test_products_are_grouped_by_type(device: EmulatedDevice) -> None:
    """q, k and v in a mixed file: v of another type is a product of its own; more than three matrices are two."""
    kinds = ("Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q4_K")
    layouts = [layout_of(kind, 16 * (i + 1), 256) for i, kind in enumerate(kinds)]
    products = [Product(DeviceWeight(layout, Buffer(0, 0)), Buffer(0, 0)) for layout in layouts]
    groups = problems_of(products, 32)
    assert [problem.widths for problem, _ in groups] == [(16, 48, 64), (80,), (32,)]
    assert [problem.kind for problem, _ in groups] == ["Q4_K", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("shared", (64 << 10, 99 << 10, 163 << 10, 227 << 10))
@BY_KIND
def test_default_tilings_fit(kind: str, shared: int) -> None:
    """Every choice fits the GPU, covers the work and is bounded by what the model says is possible."""
    gpu = GPU({64 << 10: 75, 99 << 10: 89, 163 << 10: 80}.get(shared, 90), 132, shared)
    for m in (9, 16, 24, 48, 128, 200, 256, 512):
        for widths, columns in (((4096, 1024), 4096), ((576,), 1536), ((128256,), 2048)):
            options = tilings(kind, m, widths, columns, gpu)
            cut = options[0]
            assert cut.shared_bytes(kind) <= shared
            n_units, n_blocks = cut.n_units(m, widths, columns), cut.n_blocks(m, widths, columns)
            assert (n_blocks - 1) * cut.units_per_block < n_units <= n_blocks * cut.units_per_block
            assert cut.x_stages - 1 <= (cut.w_stages - 1) * cut.chunk_columns // cut.x_columns
            cycles = [model_cycles(option, kind, m, widths, columns, gpu) for option in options]
            assert cycles == sorted(cycles)


def test_scratch_of_a_route_is_enough(device: EmulatedDevice) -> None:
    case = make(device, "Q5_1", 30, (300,), 288)
    route = Route()
    memory = memory_for(
        device,
        case,
        scratch_bytes(case.problem, route, SMALL),
        arrival_bytes(case.problem, route, SMALL),
    )
    for step in build_matmul(case.x, case.problem, case.products, route, memory, SMALL):
        device.launch(step)
    check(device, case)


@pytest.mark.parametrize("arch, shared", ((75, 64 << 10), (80, 163 << 10), (90, 227 << 10)))
@pytest.mark.parametrize("kind, m", (("Q4_K", 128), ("Q6_K", 16), ("Q5_1", 32), ("BF16", 64)))
def test_registers(arch: int, shared: int, kind: str, m: int) -> None:
    """The chosen variants compile for the GPU that they were chosen for, and nothing spills."""
    try:
        nvrtc = load_nvrtc()
    except BackendError as error:
        pytest.skip(str(error))
    cut = tilings(kind, m, (4096,), 4096, GPU(arch, 100, shared))[0]
    kernel = mma_kernel(kind, cut)
    binary = nvrtc.compile(unit_text((kernel.source, kernel.defines)), kernel.source, arch, ("--ptxas-options=-v",))
    (found,) = read_resources(binary.log)
    assert found.spill_bytes == 0 and found.registers <= 65536 // (32 * cut.warps * cut.blocks)
