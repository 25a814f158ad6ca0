"""The ops of a mixture of experts: each by itself against float64 or the reference, and no bit by cut, thread or company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch
from cpu_kernels import BLOCK_TYPES, F32, FLOAT_TYPES, ISAS, random_blocks, rng_of

from pyinfer.errors import ModelError
from pyinfer.graph.activation import quantize_activation
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.expert_math import route
from pyinfer.graph.graph import Graph, KVLayer
from pyinfer.graph.ops import CombineExperts, ExpertMatMul, Hidden, Op, RouteExperts, Value
from pyinfer.graph.passes import quantize_activations
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

pytestmark = pytest.mark.backend

N_ROWS, N_EXPERTS, N_USED, N_OUT = 37, 6, 3, 48
Int32 = npt.NDArray[np.int32]
BY_ISA = pytest.mark.parametrize("isa", ISAS)
# every type on one ISA; on the others the tiles are those of test_matmul, and what is around them depends on no type
BY_ISA_AND_TYPE = pytest.mark.parametrize(
    "isa, kind",
    [
        (isa, kind)
        for isa in ISAS
        for kind in (*BLOCK_TYPES, *FLOAT_TYPES)
        if isa == ISAS[0] or kind in ("Q4_K", "BF16")
    ],
)


class Part:
    """Ops between values that are given and results that come back, as a CPU stage."""

    def __init__(self, given: Sequence[Value], ops: Sequence[Op], results: Sequence[Value], n_threads: int = 1) -> None:
        graph = Graph(
            (*(Hidden(value) for value in given), *ops),
            results[0],
            (KVLayer(1, 16, None),),
            n_vocab=300,
            n_embd=64,
            n_ctx_train=64,
            passed=tuple(results[1:]),
        )
        graph.check()
        self.stage = CPUBackend().open_stage(
            quantize_activations(graph), StageConfig(n_pages=4, n_ctx=64, max_tokens=64, n_threads=n_threads)
        )

    def __call__(self, *hidden: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        n = len(hidden[0])
        batch = make_batch([Piece([0] * n, [0, 1, 2, 3])], 16)
        object.__setattr__(batch, "hidden", hidden)
        return [result.copy() for result in self.stage.run_part(batch)]

    def close(self) -> None:
        self.stage.close()


# ---- routing
def route_part(n_experts: int, n_used: int, **options: Any) -> tuple[RouteExperts, Part]:
    logits = Value("logits", n_experts)
    experts, weights = Value("experts", n_used, dtype="i32"), Value("weights", n_used)
    op = RouteExperts(experts, weights, logits, **options)
    return op, Part([logits], [op], [experts, weights], n_threads=2)


@BY_ISA
@pytest.mark.parametrize(
    "n_experts, n_used, options",
    [
        (6, 2, {"normalize": True}),
        (128, 8, {"normalize": True}),
        (60, 4, {"normalize": False}),
        (16, 16, {"normalize": True, "scale": 2.5}),
        (1, 1, {"normalize": False, "scoring": "sigmoid"}),
        (20, 5, {"normalize": True, "scoring": "sigmoid"}),
    ],
)
def test_routes_equal_the_reference(
    isa: str, n_experts: int, n_used: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYINFER_ISA", isa)
    op, part = route_part(n_experts, n_used, **options)
    logits = rng_of("route", n_experts).normal(0, 2, (N_ROWS, n_experts)).astype(np.float32)
    logits[1] = 0  # all alike: the first ones
    logits[2, ::2] = logits[2].max() + 1  # ties at the top
    logits[3] *= 40  # most underflow
    logits[4, n_experts // 2 :] = -np.inf
    try:
        experts, weights = part(logits)
    finally:
        part.close()
    expected_experts, expected_weights = route(op, logits)
    kept = expected_weights > 1e-30  # those that count for nothing may be any that do
    np.testing.assert_array_equal(np.where(kept, experts, -1), np.where(kept, expected_experts, -1))
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-6, atol=1e-30)
    assert experts.min() >= 0 and experts.max() < n_experts
    assert all(len(set(row)) == n_used for row in experts.tolist())


def test_rows_that_are_not_numbers_route_to_experts_that_exist() -> None:
    """The run before us may have gone wrong; memory of others is not read for it."""
    _, part = route_part(20, 4, normalize=True)
    logits = np.full((3, 20), np.nan, np.float32)
    logits[1, 3:] = 1
    logits[2] = -np.inf
    try:
        experts, _ = part(logits)
    finally:
        part.close()
    assert experts.min() >= 0 and experts.max() < 20


# ---- products
def tensor(kind: str, rows: int, columns: int) -> tuple[QuantTensor, npt.NDArray[np.float64]]:
    data = random_blocks(kind, N_EXPERTS * rows, columns, rng_of(kind, rows, columns))
    shape = (N_EXPERTS, rows, columns)
    found = QuantTensor("experts", codec_by_name(kind), shape, np.ascontiguousarray(data).reshape(len(data), -1))
    return found, found.dequantize().astype(np.float64)


def width_of(kind: str) -> int:
    return (
        48
        if kind in FLOAT_TYPES and kind != "BF16"
        else 2 * max(32, BLOCK_SOURCES[kind].format.columns if kind in BLOCK_SOURCES else 32)
    )


def uneven_experts(n_rows: int) -> Int32:
    """Every row goes to expert 4, some to two of the others, none to expert 1."""
    rng = rng_of("experts", n_rows)
    others = [rng.permutation([0, 2, 3, 5])[: N_USED - 1] for _ in range(n_rows)]
    return np.array([rng.permutation([4, *pair]) for pair in others], np.int32)


def inputs(n_rows: int, width: int) -> F32:
    rng = rng_of("x", width)
    return np.asarray(rng.standard_normal((n_rows, width)) * np.exp(rng.uniform(-3, 3, (n_rows, 1))), np.float32)


def as_read(kind: str, x: F32) -> npt.NDArray[np.float64]:
    """What is multiplied: rounded to int8, or to bfloat16 where the CPU multiplies that."""
    if kind not in FLOAT_TYPES:
        return quantize_activation(x).dequantize().astype(np.float64)
    if kind == "BF16" and current_isa().bfloat:
        codec = codec_by_name("BF16")
        return codec.dequantize(codec.quantize(x)).reshape(x.shape).astype(np.float64)
    return x.astype(np.float64)


def product_part(weights: Sequence[QuantTensor], n_slots: int, n_threads: int) -> Part:
    """Products of x, a row of `n_slots` inputs, with the experts of each row; x is given last, as it may be rounded then."""
    _, n_out, n_in = weights[0].shape
    x, experts = Value("x", n_slots * n_in), Value("experts", N_USED, dtype="i32")
    outs = tuple(Value(f"out.{i}", N_USED * n_out) for i in range(len(weights)))
    return Part([experts, x], [ExpertMatMul(outs, x, experts, tuple(weights))], outs, n_threads)


@BY_ISA_AND_TYPE
@pytest.mark.parametrize("n_slots", [1, N_USED], ids=["one input", "an input a slot"])
def test_products_equal_float64_for_any_rows(
    isa: str, kind: str, n_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYINFER_ISA", isa)
    n_in = width_of(kind)
    weight, exact = tensor(kind, N_OUT, n_in)
    x, experts = inputs(N_ROWS, n_slots * n_in), uneven_experts(N_ROWS)
    part = product_part([weight], n_slots, n_threads=1)
    try:
        (result,) = part(experts, x)
        pieces = [part(experts[rows], x[rows])[0] for rows in (slice(0, 1), slice(1, 3), slice(3, 12), slice(12, 37))]
        alone = [part(experts[row : row + 1], x[row : row + 1])[0] for row in (0, 8, 36)]
    finally:
        part.close()
    read = np.broadcast_to(as_read(kind, x).reshape(N_ROWS, n_slots, n_in), (N_ROWS, N_USED, n_in))
    expected = np.einsum("rsi,rsoi->rso", read, exact[experts]).reshape(N_ROWS, -1)
    size = np.einsum("rsi,rsoi->rso", np.abs(read), np.abs(exact[experts])).reshape(N_ROWS, -1)
    np.testing.assert_array_less(np.abs(result - expected), 1e-6 * size + 1e-30)
    np.testing.assert_array_equal(np.concatenate(pieces), result)
    np.testing.assert_array_equal(np.concatenate(alone), result[[0, 8, 36]])


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_threads_change_no_bit_of_products(kind: str) -> None:
    weights = [tensor(kind, rows, width_of(kind))[0] for rows in (16, 176)]
    x, experts = inputs(N_ROWS, width_of(kind)), uneven_experts(N_ROWS)
    results = []
    for n_threads in (1, 2, 5):
        part = product_part(weights[:1], 1, n_threads)
        other = product_part(weights[1:], 1, n_threads)
        try:
            results.append([*part(experts, x), *other(experts, x)])
        finally:
            part.close()
            other.close()
    for more in results[1:]:
        for result, first in zip(more, results[0], strict=True):
            np.testing.assert_array_equal(result, first)


def test_products_of_several_tensors_share_what_they_read() -> None:
    """As gate and up do; they may be of different types."""
    weights = [tensor(kind, N_OUT, 256)[0] for kind in ("Q4_K", "Q8_0", "Q6_K")]
    x, experts = inputs(N_ROWS, 256), uneven_experts(N_ROWS)
    together = product_part(weights, 1, 2)
    try:
        found = together(experts, x)
    finally:
        together.close()
    for weight, result in zip(weights, found, strict=True):
        part = product_part([weight], 1, 1)
        try:
            np.testing.assert_array_equal(part(experts, x)[0], result)
        finally:
            part.close()


def test_experts_of_rows_that_fill_no_group_are_a_model_error() -> None:
    weight, _ = tensor("F32", 24, 48)
    with pytest.raises(ModelError, match=r"'experts' has experts of 24 rows; the CPU kernels need a multiple of 16"):
        product_part([weight], 1, 1)


# ---- the sum
@BY_ISA
@pytest.mark.parametrize("n_used, width", [(1, 16), (3, 80), (8, 1056)])
@pytest.mark.parametrize("has_residual", [False, True])
def test_sums_equal_float64(
    isa: str, n_used: int, width: int, has_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYINFER_ISA", isa)
    x, weights, residual = Value("x", n_used * width), Value("weights", n_used), Value("residual", width)
    out = Value("out", width)
    given = [x, weights, residual] if has_residual else [x, weights]
    part = Part(given, [CombineExperts(out, x, weights, residual if has_residual else None)], [out], n_threads=3)
    rng = rng_of("combine", n_used, width)
    rows = [rng.standard_normal((N_ROWS, value.width)).astype(np.float32) for value in given]
    try:
        (result,) = part(*rows)
        alone = part(*(each[5:6] for each in rows))[0]
    finally:
        part.close()
    slots = rows[0].reshape(N_ROWS, n_used, width).astype(np.float64)
    expected = np.einsum("rs,rsw->rw", rows[1].astype(np.float64), slots) + (rows[2] if has_residual else 0)
    np.testing.assert_allclose(result, expected, atol=2e-6 * n_used)
    np.testing.assert_array_equal(alone[0], result[5])
