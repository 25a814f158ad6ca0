"""A mixture of experts on the emulator: the choice, the products of every type by both ways, the sum, and whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import a8_codes
from gpu_matrices import operand as rows_operand
from tiny_models import TinyShape

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.expert_math import combine, expert_matmul, route
from pyinfer.graph.ops import RouteExperts, Value
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceStage
from pyinfer.kernels_gpu.expert_tiles import build_expert_matmul, build_tiles, tiled_products, tiles_bytes
from pyinfer.kernels_gpu.experts import (
    Scoring,
    Slots,
    build_combine,
    build_expert_matvec,
    build_gated_expert_matvec,
    build_route,
)
from pyinfer.kernels_gpu.launch import Buffer, Launch
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.mma_tiling import GPU, MMA_KINDS
from pyinfer.kernels_gpu.operand import Operand, operand_at, operand_bytes
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.kernels_gpu.weights import DeviceWeight
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES, KINDS, layout_of, pack
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.tensor import QuantTensor
from pyinfer.runtime.models.registry import build_graph

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
F32 = npt.NDArray[np.float32]
N_EXPERTS = 5
SMALL = GPU(90, 4, 227 << 10)


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


def launch(device: EmulatedDevice, steps: list[Launch]) -> None:
    for step in steps:
        device.launch(step)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "n_experts, n_used, normalize", [(5, 2, True), (60, 4, False), (128, 8, True), (64, 40, True), (1, 1, False)]
)
def test_the_choice_of_experts(
    device: EmulatedDevice, scoring: Scoring, n_experts: int, n_used: int, normalize: bool
) -> None:
    """Among them rows with ties, a row of equal logits, and one so small that the sum of weights is bounded."""
    rng = np.random.default_rng(n_experts)
    logits = rng.normal(0, 3, (9, n_experts)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2] = 0.5
    logits[3] -= 40
    op = RouteExperts(
        Value("e", n_used, "tokens", "i32"), Value("w", n_used), Value("l", n_experts), normalize, 2.5, scoring
    )
    expected = route(op, logits)
    experts, weights = device.empty(9, n_used, dtype=np.int32), device.empty(9, n_used)
    present = device.array(np.array([0, 0, 1, 1, 1, 2, -1, -1, -1], np.int32))
    launch(device, build_route(
        experts, weights, device.array(logits), present, 9, n_used, n_experts,
        normalize=normalize, scale=2.5, scoring=scoring,
    ))  # fmt: skip
    found = device.values(experts, np.int32, 9, n_used), device.values(weights, np.float32, 9, n_used)
    assert (found[0][:6] == expected[0][:6]).all()
    np.testing.assert_allclose(found[1][:6], expected[1][:6], rtol=3e-6, atol=1e-30)
    assert (found[0][6:] == -1).all() and (found[1][6:] == 0).all(), "padding"


def test_no_number_is_no_expert_past_the_last(device: EmulatedDevice) -> None:
    """What is read with the choice as an index must exist, whatever the logits are."""
    logits = np.full((3, 5), np.nan, np.float32)
    logits[1] = -np.inf
    logits[2, 3] = 1.0
    experts, weights = device.empty(3, 4, dtype=np.int32), device.empty(3, 4)
    launch(device, build_route(
        experts, weights, device.array(logits), device.array(np.zeros(3, np.int32)), 3, 4, 5,
        normalize=True, scale=1.0, scoring="softmax",
    ))  # fmt: skip
    chosen = device.values(experts, np.int32, 3, 4)
    assert all(sorted(set(row)) == sorted(row) and min(row) >= 0 and max(row) < 5 for row in chosen.tolist())


@pytest.mark.parametrize("in_place", [False, True])
def test_the_weighted_sum(device: EmulatedDevice, in_place: bool) -> None:
    rng = np.random.default_rng(3)
    arrays = rng.normal(size=(6, 3 * 132)), rng.random((6, 3)), rng.normal(size=(6, 132))
    x, weights, residual = (array.astype(np.float32) for array in arrays)
    beside = device.array(residual)
    out = beside if in_place else device.empty(6, 132)
    launch(device, build_combine(out, device.array(x), device.array(weights), 132, 6, 3, beside))
    np.testing.assert_allclose(
        device.values(out, np.float32, 6, 132), combine(x, weights, residual), rtol=1e-5, atol=1e-6
    )
    launch(device, build_combine(out, device.array(x), device.array(weights), 132, 6, 3))
    np.testing.assert_allclose(device.values(out, np.float32, 6, 132), combine(x, weights, None), rtol=1e-5, atol=1e-6)


class Case:
    """Matrices of `N_EXPERTS` experts, chosen experts, and rows of x in a form."""

    def __init__(
        self,
        device: EmulatedDevice,
        kinds: tuple[str, ...],
        widths: tuple[int, ...],
        columns: int,
        n_rows: int,
        *,
        own: bool,
    ) -> None:
        """`own`: each slot has a row of x of its own."""
        self.rng = rng = np.random.default_rng(n_rows * columns + sum(widths))
        self.device, n_used = device, 2
        self.experts = np.array([rng.permutation(N_EXPERTS)[:n_used] for _ in range(n_rows)], np.int32)
        self.experts[self.experts == 3] = 4  # nobody asks the fourth; some ask the fifth twice
        self.slots = Slots(device.array(self.experts), n_rows, n_used, N_EXPERTS)
        self.width = columns * (n_used if own else 1)
        self.tensors, self.products = [], []
        for kind, n in zip(kinds, widths, strict=True):
            codec = codec_by_name(kind)
            values = rng.standard_normal((N_EXPERTS * n, columns)).astype(np.float32) * np.float32(0.02)
            tensor = QuantTensor("w", codec, (N_EXPERTS, n, columns), codec.quantize(values))
            layout = layout_of(kind, N_EXPERTS * n, columns)
            weight = DeviceWeight(layout, device.alloc(layout.n_bytes))
            for offset, part in pack(tensor):
                device.upload(weight.buffer, np.ascontiguousarray(part), offset)
            self.tensors.append(tensor)
            self.products.append(Product(weight, device.empty(n_rows * n_used, n)))

    def check(self, x: F32, tolerance: float) -> None:
        for tensor, product in zip(self.tensors, self.products, strict=True):
            expected = expert_matmul(x, self.experts, tensor, None)
            got = self.device.values(product.out, np.float32, *expected.shape)
            assert np.linalg.norm(got - expected) / np.linalg.norm(expected) <= tolerance
            assert np.abs(got - expected).max() <= 20 * tolerance * np.abs(expected).max()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_few_slots_of_every_type(device: EmulatedDevice, kind: str, own: bool) -> None:
    case = Case(device, (kind,), (40,), 512 if kind.endswith("_K") else 352, 3, own=own)
    x = case.rng.standard_normal((3, case.width)).astype(np.float32)
    if kind in FLOAT_BYTES:
        operand = Operand("f32", case.width, device.array(x))
    else:
        operand, exact = rows_operand(device, x, "a8")
        x = exact.astype(np.float32)
    launch(device, build_expert_matvec(operand, case.products, case.slots, n_sms=4, arch=90))
    case.check(x, 2e-6)


def test_few_slots_of_matrices_of_several_types(device: EmulatedDevice) -> None:
    case = Case(device, ("Q4_K", "Q6_K", "Q8_0", "Q4_K"), (40, 24, 8, 16), 256, 2, own=False)
    operand, exact = rows_operand(device, case.rng.standard_normal((2, 256)).astype(np.float32), "a8")
    launch(device, build_expert_matvec(operand, case.products, case.slots, n_sms=4, arch=90))
    case.check(exact.astype(np.float32), 2e-6)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16"])
def test_gate_and_up_with_their_activation(device: EmulatedDevice, kind: str) -> None:
    """The numbers are those of both products by themselves, rounded where int8 is asked for."""
    case = Case(device, (kind, kind), (64, 64), 256, 3, own=False)
    x = case.rng.standard_normal((3, 256)).astype(np.float32)
    operand, form = Operand("f32", 256, device.array(x)), "f32"
    if kind not in FLOAT_BYTES:
        (operand, exact), form = rows_operand(device, x, "a8"), "a8"
        x = exact.astype(np.float32)
    gate, up = (expert_matmul(x, case.experts, tensor, None) for tensor in case.tensors)
    expected = gate / (1 + np.exp(-gate)) * up
    out = operand_at(form, 3, 128, device.empty(operand_bytes(form, 3, 128), dtype=np.uint8))  # type: ignore[arg-type]
    weights = [product.weight for product in case.products]
    launch(device, build_gated_expert_matvec(
        out, operand, weights[0], weights[1], "silu", case.slots, n_sms=4, arch=90,
    ))  # fmt: skip
    if form == "f32":
        got = device.values(out.data, np.float32, 3, 128)
    else:
        assert out.scales is not None and out.sums is not None
        codes, scales = a8_codes(device, out, 3), device.values(out.scales, np.float32, 3, 4)
        got = (codes * scales[:, :, None]).reshape(3, 128)
        totals = scales * codes.sum(axis=2, dtype=np.int32)
        np.testing.assert_allclose(device.values(out.sums, np.float32, 3, 4), totals, rtol=1e-6)
    assert np.abs(got - expected).max() <= (1e-5 if form == "f32" else 6e-3) * np.abs(expected).max()


def run_tiles(device: EmulatedDevice, case: Case, n_rows: int, *, scaled: bool, tolerance: float = 2e-3) -> None:
    halves = case.rng.standard_normal((n_rows, case.width)).astype(np.float16)
    scales = np.exp2(case.rng.integers(-3, 4, n_rows)).astype(np.float32) if scaled else np.ones(n_rows, np.float32)
    operand = Operand("h16", case.width, device.array(halves), device.array(scales) if scaled else None)
    for product in tiled_products(case.products, case.slots, SMALL):
        rows = product.cut.rows
        tiles, sort = build_tiles(case.slots, rows, device.alloc(tiles_bytes(case.slots, rows)))
        launch(device, [*sort, *build_expert_matmul(operand, product, case.slots, tiles)])
    case.check(halves.astype(np.float32) * scales[:, None], tolerance)


@pytest.mark.parametrize("kind", MMA_KINDS)
def test_many_slots_of_every_type(device: EmulatedDevice, kind: str) -> None:
    """Columns that end within a chunk, rows that end within a tile, an expert without slots."""
    case = Case(device, (kind,), (72,), 512 if kind.endswith("_K") else 288, 13, own=True)
    run_tiles(device, case, 13, scaled=True)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n_rows", [9, 200])
def test_many_slots_of_several_matrices(descending: bool, n_rows: int) -> None:
    """Tiles of several sizes; experts with several tiles; two types are two launches."""
    device = EmulatedDevice(descending=descending)
    case = Case(device, ("Q4_K", "Q6_K", "Q4_K"), (136, 40, 24), 256, n_rows, own=False)
    run_tiles(device, case, n_rows, scaled=False)
    device.close()


@pytest.mark.parametrize("kind", ["Q4_K", "F32"])
def test_padding_asks_no_expert(device: EmulatedDevice, kind: str) -> None:
    """Nine rows padded to twelve, by both ways: padding is in no tile, and neither its expert nor what its slots hold is read."""
    n, padded, columns, poisoned = 9, 12, 256, 3  # `Case` leaves the fourth expert out
    case = Case(device, (kind,), (40,), columns, padded, own=False)
    case.experts[n:] = -1
    slots = Slots(device.array(case.experts), padded, 2, N_EXPERTS)
    (product,), (tensor,) = case.products, case.tensors
    layout = product.weight.layout
    if kind == "F32":
        row_bytes = layout.n_bytes // layout.n_rows
        device.upload(product.weight.buffer, np.full(40 * row_bytes, 0xFF, np.uint8), poisoned * 40 * row_bytes)
    x = case.rng.standard_normal((padded, columns)).astype(np.float16)
    x[n:] = np.nan
    weights = case.rng.random((padded, 2)).astype(np.float32)
    weights[n:] = 0
    if kind == "F32":
        operand = Operand("f32", columns, device.array(x.astype(np.float32)))
        launch(device, build_expert_matvec(operand, case.products, slots, n_sms=4, arch=90))
    else:
        (tiled,) = tiled_products(case.products, slots, SMALL)
        rows = tiled.cut.rows
        tiles, sort = build_tiles(slots, rows, device.alloc(tiles_bytes(slots, rows)))
        launch(device, [*sort, *build_expert_matmul(Operand("h16", columns, device.array(x)), tiled, slots, tiles)])
        used = device.values(tiles.expert_of_tile, np.int32, tiles.n_tiles)
        needed = sum(-(-int((case.experts == e).sum()) // rows) for e in range(N_EXPERTS))
        assert (used >= 0).sum() == needed and poisoned not in used
        held = device.values(tiles.slot_of_row, np.int32, tiles.n_tiles * rows)
        assert sorted(held[held >= 0].tolist()) == list(range(2 * n))
    got = device.values(product.out, np.float32, padded, 2 * 40)
    expected = expert_matmul(x[:n].astype(np.float32), case.experts[:n], tensor, None)
    assert np.linalg.norm(got[:n] - expected) <= 2e-3 * np.linalg.norm(expected)
    device.upload(product.out, np.full((padded - n, 80), np.nan, np.float32), 4 * n * 80)
    out = device.empty(padded, 40)
    launch(device, build_combine(out, product.out, device.array(weights), 40, padded, 2))
    total = device.values(out, np.float32, padded, 40)
    np.testing.assert_allclose(total[:n], combine(got[:n], weights[:n], None), rtol=1e-5, atol=1e-6)
    assert (total[n:] == 0).all()


CONFIG = StageConfig(n_pages=24, block_size=16, max_tokens=32, max_sequences=4, n_ctx=96, kv_dtype="f32")


def kinds_of_a_file(name: str) -> str:
    return "F32" if "gate_inp" in name else "Q6_K" if "down" in name else "Q4_K"


def check_padding(device: EmulatedDevice, stage: GPUStage, n_tokens: int, n_outputs: int) -> None:
    """Every choice of experts in the latest step: rows of tokens have one, those behind have none."""
    shape, captured = list(stage._programs.items())[-1]
    routes = [
        step for step in captured.program.steps if isinstance(step, Launch) and step.kernel.name == "route_experts"
    ]
    counts = []
    for step in routes:
        present, n_rows = step.args[1], step.args[2]
        assert isinstance(present, Buffer) and isinstance(n_rows, int)
        rows = device.values(present, np.int32, n_rows)
        counts.append(int((rows >= 0).sum()))
        assert n_rows in (shape.n_tokens, shape.n_outputs) and (rows[counts[-1] :] == -1).all()
    assert counts == [*[n_tokens] * (len(routes) - 1), n_outputs]


@pytest.mark.parametrize(
    "arch, kind, bound",
    [
        ("qwen2moe", "F32", 1e-5),
        ("llama", "BF16", 5e-2),
        ("qwen3moe", kinds_of_a_file, 5e-2),
    ],
    ids=["qwen2moe F32", "llama BF16", "qwen3moe mixed"],
)
def test_whole_models(
    arch: str, kind: str | Callable[[str], str], bound: float, tiny_model: Callable[..., Path]
) -> None:
    """Prompt, chunk and decode against the reference; a rounded code may fall the other way, and then another expert may win."""
    graph = optimize(build_graph(GGUFFile.open(tiny_model(arch, kind, shape=TinyShape(n_experts=6)))))
    device = EmulatedDevice()
    stage, expected = GPUStage(device, graph, CONFIG), ReferenceStage(graph, CONFIG)
    ids, table = np.random.RandomState(5).randint(0, 300, 60).tolist(), [3, 1, 7, 9]
    try:
        for start, n in ((0, 20), (20, 1), (21, 3), (24, 9)):
            batch = make_batch([Piece(ids[start : start + n], table, start)], 16)
            got, wanted = stage.run(batch), expected.run(batch)
            assert np.median(np.abs(got - wanted)) < bound * np.abs(wanted).max()
            if kind == "F32":
                assert np.abs(got - wanted).max() < bound * np.abs(wanted).max()
            check_padding(device, stage, n, len(batch.output_rows))
        names = set(device.launches)
        assert {"route_experts", "gemv_gated_experts", "gemv_experts"} <= names
        assert ("combine_experts" in names) == (arch == "qwen2moe"), "sums go into the next norm"
        assert ("expert_mma" in names) == (kind != "F32")
        assert device.launches.get("sort_slots", 0) <= 4 * len(graph.kv_layers), "more than two a layer and prompt"
    finally:
        stage.close()
