"""Ops that work on each row by itself, on every ISA, against float64 and the definition of "a8"."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import (
    BLOCK_TYPES,
    F32,
    FLOAT_TYPES,
    ISAS,
    Guarded,
    a8_bytes,
    call,
    compiler,
    dequantized,
    float_bits,
    padded_rows,
    random_blocks,
    rng_of,
    step_header,
)

from pyinfer.graph.activation import quantize_activation
from pyinfer.kernels_cpu.activation_a8 import row_bytes
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.repack import EmbedArg
from pyinfer.kernels_cpu.row_ops import (
    RowArg,
    add_body,
    gated_body,
    quantize_body,
    rms_norm_body,
    select_rows_body,
)
from pyinfer.kernels_cpu.weights import embed_kernel

pytestmark = pytest.mark.backend

F64 = npt.NDArray[np.float64]
EPS = float(np.float32(1e-5))
BY_ISA = pytest.mark.parametrize("isa", ISAS)
BODIES = {
    "quantize": quantize_body("a8"),
    "rms_norm_f32": rms_norm_body("f32"),
    "rms_norm_a8": rms_norm_body("a8"),
    "silu_f32": gated_body("silu", "f32"),
    "silu_a8": gated_body("silu", "a8"),
    "gelu_tanh_f32": gated_body("gelu_tanh", "f32"),
    "gelu_tanh_a8": gated_body("gelu_tanh", "a8"),
    "add": add_body(),
    "select_rows": select_rows_body(),
}


def run(
    isa: str,
    name: str,
    x: F32,
    second: F32 | None = None,
    *,
    parts: int = 1,
    width: int | None = None,
    n_out: int | None = None,
    step: dict[str, int] | None = None,
    cuts: tuple[int, ...] = (),
) -> npt.NDArray[Any]:
    """One row op of `row_ops`: float32 [rows, columns], or the bytes of an "a8" value.

    `second` is the other operand [rows, columns], or the norm's weight as one row.
    """
    is_a8 = name.endswith("_a8") or name == "quantize"
    n_out = len(x) if n_out is None else n_out
    source, x_stride = padded_rows(x)
    out_stride = row_bytes(x.shape[1]) if is_a8 else x_stride
    out = Guarded(out_stride * n_out, 0xFF)
    arguments = {
        RowArg.X: source.address, RowArg.X_STRIDE: x_stride, RowArg.OUT: out.address, RowArg.OUT_STRIDE: out_stride,
        RowArg.WIDTH: width or x.shape[1], RowArg.N_PARTS: parts, RowArg.ROWS_FIELD: StepField.N_OUTPUTS,
        RowArg.EPS: float_bits(EPS),
    }  # fmt: skip
    if second is not None:
        other, stride = padded_rows(second)
        arguments |= {RowArg.Y: other.address, RowArg.Y_STRIDE: stride}
    header = step_header(n_outputs=n_out, n_tokens=1 << 40, **(step or {}))
    n_tasks = n_out if name.startswith("rms_norm") else n_out * parts
    call(compiler(isa).kernel(name, BODIES[name]), arguments, header, n_tasks, cuts=cuts)
    out.check()
    return out.bytes.copy() if is_a8 else out.floats(n_out)[:, : x.shape[1]].copy()


def normal(*shape: int) -> F32:
    return rng_of("row ops", shape).standard_normal(shape).astype(np.float32)


# ---- quantize
def awkward_rows(n_rows: int, width: int) -> F32:
    """Normal rows with blocks of zeros, of tiny and of huge values, and of codes halfway between two integers."""
    rng = rng_of("awkward", n_rows, width)
    blocks = rng.standard_normal((n_rows * width // 32, 32))
    blocks /= np.abs(blocks).max(1, keepdims=True)
    halves = rng.randint(-127, 127, blocks.shape) + 0.5
    halves[:, 0] = 127
    size = np.exp(rng.uniform(-20, 20, (len(blocks), 1)))
    for i in range(len(blocks)):
        blocks[i] = (blocks[i] * size[i], 0.0, -0.0, blocks[i] * 1e-28, blocks[i] * 1e37, halves[i])[i % 6]
    return blocks.reshape(n_rows, width).astype(np.float32)


@BY_ISA
@pytest.mark.parametrize("width", [32, 96, 576, 2048])
def test_quantize_equals_its_definition_bit_for_bit(isa: str, width: int) -> None:
    for n_rows in range(1, 18):
        x = awkward_rows(n_rows, width)
        np.testing.assert_array_equal(run(isa, "quantize", x), a8_bytes(x), err_msg=f"{n_rows} rows")
        if width >= 96:
            cut = run(isa, "quantize", x, parts=3, cuts=(2, 2 * n_rows))
            np.testing.assert_array_equal(cut, a8_bytes(x), err_msg=f"{n_rows} rows in parts")


def test_awkward_rows_are_awkward() -> None:
    a = quantize_activation(awkward_rows(17, 576))
    assert (a.scales == 0).any() and (a.scales > 1e34).any() and ((a.scales > 0) & (a.scales < 1e-29)).any()
    assert a.codes.min() == -127 and a.codes.max() == 127


@BY_ISA
@pytest.mark.parametrize("largest", [1e-38, 1e-33, 1e-31, 1.1e-30, 5e-30])
def test_blocks_too_small_for_a_reciprocal(isa: str, largest: float) -> None:
    x = normal(3, 64)
    x *= np.float32(largest) / np.abs(x).max()
    np.testing.assert_array_equal(run(isa, "quantize", x), a8_bytes(x))


# ---- norms
def exact_norm(x: F32, weight: F32) -> F64:
    groups = x.astype(np.float64).reshape(len(x), -1, weight.size)
    root = np.sqrt((groups**2).mean(2, keepdims=True) + EPS)
    return (groups / root * weight).reshape(x.shape)


@BY_ISA
@pytest.mark.parametrize("width, group", [(16, 16), (576, 576), (2048, 2048), (640, 80), (256, 64), (768, 256)])
def test_rms_norm_of_rows_and_of_heads(isa: str, width: int, group: int) -> None:
    x = normal(5, width) * np.array([[1], [1e-4], [1e4], [0], [1]], np.float32)
    weight = normal(1, group)
    result = run(isa, "rms_norm_f32", x, weight, width=group, parts=width // group, cuts=(1, 3))
    np.testing.assert_allclose(result, exact_norm(x, weight[0]), rtol=1e-6, atol=0)


@BY_ISA
@pytest.mark.parametrize("width", [32, 576, 2048])
def test_rms_norm_quantizes_what_it_would_return(isa: str, width: int) -> None:
    for n_rows in (1, 2, 3, 7, 8, 13):
        x, weight = normal(n_rows, width), normal(1, width)
        floats = run(isa, "rms_norm_f32", x, weight)
        np.testing.assert_array_equal(run(isa, "rms_norm_a8", x, weight, cuts=(n_rows // 2,)), a8_bytes(floats))


# ---- gated activations
def exact_gate(x: F32, up: F32, activation: str) -> F64:
    gate = x.astype(np.float64)
    if activation == "silu":
        with np.errstate(over="ignore"):
            return gate / (1 + np.exp(-gate)) * up
    return gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2 * up


@BY_ISA
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activations(isa: str, activation: str) -> None:
    gate = np.concatenate([np.linspace(-20, 20, 4000), np.linspace(-1e-3, 1e-3, 192)])[None].astype(np.float32)
    up = normal(1, 4192)
    result = run(isa, f"{activation}_f32", gate, up, parts=5, cuts=(1, 2))
    exact = exact_gate(gate, up, activation)
    # far down the left tail gelu is a difference of nearly equal numbers in exp's argument: relative to |up| there
    np.testing.assert_allclose(result, exact, rtol=2e-6, atol=1e-9)


@BY_ISA
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_far_out_are_zero_or_pass(isa: str, activation: str) -> None:
    gate = np.array([[-1e4, -200, -100, -0.0, 0, 100, 200, 1e4] * 4], np.float32)
    result = run(isa, f"{activation}_f32", gate, np.ones_like(gate))
    np.testing.assert_allclose(result, np.maximum(gate, 0), atol=1e-33)


@BY_ISA
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activations_quantize_what_they_would_return(isa: str, activation: str) -> None:
    for n_rows in (1, 3, 8, 13):
        gate, up = normal(n_rows, 1152), normal(n_rows, 1152)[::-1].copy()
        floats = run(isa, f"{activation}_f32", gate, up)
        a8 = run(isa, f"{activation}_a8", gate, up, parts=2, cuts=(n_rows,))
        np.testing.assert_array_equal(a8, a8_bytes(floats))


# ---- add, select, embed
@BY_ISA
@pytest.mark.parametrize("width", [16, 80, 576])
def test_add(isa: str, width: int) -> None:
    a, b = normal(5, width), normal(6, width)[1:]
    np.testing.assert_array_equal(run(isa, "add", a, b, cuts=(2,)), a + b)


@BY_ISA
@pytest.mark.parametrize("width", [16, 80, 576])
def test_select_rows(isa: str, width: int) -> None:
    x = normal(9, width)
    rows = np.array([0, 3, 4, 8], np.int32)
    result = run(isa, "select_rows", x, n_out=4, step={"output_rows": rows.ctypes.data}, cuts=(3,))
    np.testing.assert_array_equal(result, x[rows])


@BY_ISA
@pytest.mark.parametrize("scale", [1.0, 25.25])
@pytest.mark.parametrize("kind", [*BLOCK_TYPES, *FLOAT_TYPES])
def test_embedding_rows(isa: str, kind: str, scale: float) -> None:
    columns = 512 if kind in BLOCK_TYPES else 80
    table = random_blocks(kind, 21, columns, rng_of("table", kind))
    ids = np.array([20, 0, 7, 7, 13], np.int32)
    out = Guarded(4 * columns * len(ids), 0xFF)
    block = 16 if kind in FLOAT_TYPES else BLOCK_SOURCES[kind].format.columns
    arguments = {
        EmbedArg.TABLE: table.ctypes.data, EmbedArg.ROW_BYTES: table.shape[1],
        EmbedArg.OUT: out.address, EmbedArg.OUT_STRIDE: 4 * columns,
        EmbedArg.N_BLOCKS: columns // block, EmbedArg.SCALE: float_bits(scale),
    }  # fmt: skip
    step = step_header(token_ids=ids.ctypes.data, n_tokens=len(ids))
    call(embed_kernel(compiler(isa), kind), arguments, step, len(ids), cuts=(2,))
    out.check()
    exact = dequantized(kind, table)[ids].astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(out.floats(len(ids)), exact)
