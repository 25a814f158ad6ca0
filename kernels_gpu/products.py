"""Matrix products: which kernels multiply, by the number of rows and the type of the weights."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfer.kernels_gpu.buckets import DECODE_ROWS
from pyinfer.kernels_gpu.launch import Buffer, Step
from pyinfer.kernels_gpu.matmul import (
    MatmulMemory,
    arrival_bytes,
    build_matmul,
    is_float16,
    problems_of,
    scratch_bytes,
)
from pyinfer.kernels_gpu.matmul_route import Problem, Route
from pyinfer.kernels_gpu.matvec import Product, RowNorm, build_matvec
from pyinfer.kernels_gpu.operand import Form, Operand
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES
from pyinfer.kernels_gpu.workspace import ValuePlan
from pyinfer.quant.tensor import QuantTensor

_MMA_COLUMNS = 8  # that a row of a tensor-core product must be a multiple of


def operand_form(weight: QuantTensor, n_rows: int) -> Form:
    """The form in which a matrix of this type reads so many rows; many rows of float32 go to cuBLAS as they are."""
    kind = weight.codec.name
    if n_rows <= DECODE_ROWS:
        return "f32" if kind in FLOAT_BYTES else "a8"
    return "f32" if kind == "F32" or weight.shape[-1] % _MMA_COLUMNS else "h16"


def build_products(
    x: Operand,
    products: Sequence[Product],
    n_rows: int,
    residual: Buffer | None,
    memory: StageMemory,
    plan: ValuePlan,
    *,
    halves: bool = False,
    norm: RowNorm | None = None,
) -> list[Step]:
    """Each product's out = x @ weight.T + bias (+ residual), all of which read x in the form that it has. `halves`: outs are
    float16, where `goes_to_cublas`. `norm`: of a single row, see `build_matvec`."""
    if x.form == "h16":
        return _many_rows(x, products, n_rows, residual, memory, plan, halves=halves)
    if n_rows <= DECODE_ROWS:
        return _few_rows(x, products, n_rows, residual, memory, norm)
    by_cublas = [product for product in products if product.weight.layout.kind == "F32"]
    others = [product for product in products if product.weight.layout.kind != "F32"]
    steps = _many_rows(x, by_cublas, n_rows, residual, memory, plan)
    return [*steps, *_few_rows(x, others, n_rows, residual, memory)] if others else steps


def _few_rows(
    x: Operand, products: Sequence[Product], n_rows: int, residual: Buffer | None, memory: StageMemory,
    norm: RowNorm | None = None,
) -> list[Step]:  # fmt: skip
    """Rows eight at a time: all there are in decode; any number for 16-bit floats whose rows the tensor cores cannot take."""
    steps: list[Step] = []
    for first in range(0, n_rows, DECODE_ROWS):
        some = min(DECODE_ROWS, n_rows - first)
        part, outs, rest = x, products, residual
        if some < n_rows:
            assert x.form == "f32"
            part = Operand("f32", x.width, x.data.at(4 * first * x.width))
            outs = [Product(p.weight, p.out.at(4 * first * p.weight.layout.n_rows), p.bias) for p in products]
            rest = residual and residual.at(4 * first * products[0].weight.layout.n_rows)
        gpu = memory.device
        steps += build_matvec(part, outs, some, n_sms=gpu.n_sms, arch=gpu.arch, residual=rest, norm=norm)
    return steps


def _many_rows(
    x: Operand, products: Sequence[Product], n_rows: int, residual: Buffer | None, memory: StageMemory, plan: ValuePlan,
    *, halves: bool = False,
) -> list[Step]:  # fmt: skip
    steps: list[Step] = []
    gpu = memory.routes.gpu
    for problem, part in problems_of(products, n_rows):
        route = _route(problem, part, memory)
        scratch = plan.scratch(scratch_bytes(problem, route, gpu))
        work = MatmulMemory(scratch, memory.counters(arrival_bytes(problem, route, gpu)), memory.copies)
        steps += build_matmul(x, problem, part, route, work, gpu, residual=residual, halves=halves)
        plan.release(scratch)
    return steps


def goes_to_cublas(products: Sequence[Product], n_rows: int, memory: StageMemory) -> bool:
    """Whether cuBLAS computes all of these products of "h16" rows."""
    return all(_route(problem, part, memory).slice_rows for problem, part in problems_of(products, n_rows))


def _route(problem: Problem, products: Sequence[Product], memory: StageMemory) -> Route:
    return memory.routes.route(problem, is_float16=is_float16(products, memory.copies))
