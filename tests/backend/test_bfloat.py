"""BF16 weights by dot products of bfloat16 pairs, where the CPU has them: repack, matmul, and the ops before it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import (
    F32,
    ISAS,
    Guarded,
    call,
    compiler,
    dequantized,
    float_bits,
    padded_rows,
    random_blocks,
    rng_of,
    step_header,
)

from pyinfer.kernels_cpu.isa import make_isa
from pyinfer.kernels_cpu.matmul_bfloat import BFLOAT_PAIRS
from pyinfer.kernels_cpu.matmul_block import MatMulArg
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.repack import RepackArg
from pyinfer.kernels_cpu.row_ops import RowArg, gated_body, quantize_body, rms_norm_body
from pyinfer.kernels_cpu.weights import matmul_kernel, repack_kernel
from pyinfer.quant.codecs import codec_by_name

BFLOAT_ISAS = [isa for isa in ISAS if make_isa(isa).bfloat]
pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(not BFLOAT_ISAS, reason="this CPU has no dot products of bfloat16"),
]
BY_ISA = pytest.mark.parametrize("isa", BFLOAT_ISAS)
BF16 = codec_by_name("BF16")


def rounded(x: F32) -> F32:
    """x as the codec rounds it, half to even."""
    return BF16.dequantize(BF16.quantize(x)).reshape(x.shape)


def bfloat_rows(x: F32) -> Guarded:
    memory = Guarded(x.size * 2)
    memory.bytes[:] = BF16.quantize(x).ravel()
    return memory


@BY_ISA
@pytest.mark.parametrize("shape", [(16, 32), (37, 64), (5, 288), (48, 576), (33, 2048)])
def test_matmul_equals_float64_for_any_number_of_rows(isa: str, shape: tuple[int, int]) -> None:
    n_rows, columns = shape
    data = random_blocks("BF16", n_rows, columns, rng_of("bfloat", shape))
    n_groups = -(-n_rows // 16)
    source, packed = Guarded(data.size), Guarded(n_groups * columns * 32)
    source.bytes[:] = data.ravel()
    repacking = {
        RepackArg.SOURCE: source.address, RepackArg.ROW_BYTES: data.shape[1], RepackArg.N_ROWS: n_rows,
        RepackArg.TARGET: packed.address, RepackArg.N_RECORDS: columns,
    }  # fmt: skip
    call(repack_kernel(compiler(isa), BFLOAT_PAIRS), repacking, step_header(), n_groups, cuts=range(1, n_groups))
    packed.check()
    weights = dequantized("BF16", data)
    rng = rng_of("x", shape)
    inputs = rounded((rng.standard_normal((17, columns)) * np.exp(rng.uniform(-3, 3, (17, 1)))).astype(np.float32))
    bias, residual = (rng.standard_normal(size).astype(np.float32) for size in ((1, n_rows), (17, n_rows)))
    first: npt.NDArray[np.float32] | None = None
    for m in range(17, 0, -1):
        x, out = bfloat_rows(inputs[:m]), Guarded(n_groups * 64 * m, 0xFF)
        padded_bias, _ = padded_rows(bias)
        padded_residual, residual_stride = padded_rows(residual[:m])
        arguments = {
            MatMulArg.WEIGHTS: packed.address, MatMulArg.GROUP_BYTES: columns * 32, MatMulArg.N_RECORDS: columns,
            MatMulArg.X: x.address, MatMulArg.X_ROW_BYTES: 2 * columns, MatMulArg.OUT: out.address,
            MatMulArg.OUT_STRIDE: n_groups * 64, MatMulArg.ROWS_FIELD: StepField.N_OUTPUTS, MatMulArg.ROW_BLOCK: 8,
            MatMulArg.BIAS: padded_bias.address, MatMulArg.RESIDUAL: padded_residual.address,
            MatMulArg.RESIDUAL_STRIDE: residual_stride,
        }  # fmt: skip
        kernel = matmul_kernel(compiler(isa), BFLOAT_PAIRS)
        call(kernel, arguments, step_header(n_outputs=m), n_groups, cuts=range(1, n_groups))
        for buffer in (x, out, packed):
            buffer.check()
        result = out.floats(m)[:, :n_rows].copy()
        exact = inputs[:m].astype(np.float64) @ weights.T + bias + residual[:m]
        size = np.abs(inputs[:m]).astype(np.float64) @ np.abs(weights).T + np.abs(bias) + np.abs(residual[:m])
        np.testing.assert_array_less(np.abs(result - exact), 1e-6 * size + 1e-30)
        first = result if first is None else first
        np.testing.assert_array_equal(result, first[:m], err_msg=f"{m} rows differ from 17")


@BY_ISA
@pytest.mark.parametrize("width", [32, 96, 576])
@pytest.mark.parametrize("name", ["quantize", "rms_norm", "silu", "gelu_tanh"])
def test_rounded_outputs_equal_the_float_ones_rounded(isa: str, name: str, width: int) -> None:
    rng = rng_of(name, width)
    x, y = (rng.standard_normal((5, width)).astype(np.float32) for _ in range(2))
    x[0, :4] = [0.0, -0.0, np.inf, 1e-40]
    results = {}
    for dtype in ("f32", "bf16"):
        if name == "quantize" and dtype == "f32":
            results[dtype] = x
            continue
        bodies = {
            "quantize": quantize_body(dtype), "rms_norm": rms_norm_body(dtype), "silu": gated_body("silu", dtype),
            "gelu_tanh": gated_body("gelu_tanh", dtype),
        }  # fmt: skip
        source, stride = padded_rows(x)
        other, other_stride = padded_rows(y[:1] if name == "rms_norm" else y)
        out_stride = 2 * width if dtype == "bf16" else 4 * width
        out = Guarded(out_stride * len(x), 0xFF)
        arguments = {
            RowArg.X: source.address, RowArg.X_STRIDE: stride, RowArg.OUT: out.address, RowArg.OUT_STRIDE: out_stride,
            RowArg.WIDTH: width, RowArg.N_PARTS: 1, RowArg.ROWS_FIELD: StepField.N_OUTPUTS,
            RowArg.EPS: float_bits(1e-5), RowArg.Y: other.address, RowArg.Y_STRIDE: other_stride,
        }  # fmt: skip
        kernel = compiler(isa).kernel(f"{name}_{dtype}", bodies[name])
        call(kernel, arguments, step_header(n_outputs=len(x)), len(x))
        out.check()
        codes = out.bytes.reshape(len(x), -1)
        results[dtype] = BF16.dequantize(codes) if dtype == "bf16" else codes.view(np.float32).copy()
    with np.errstate(invalid="ignore"):
        expected = rounded(results["f32"])
    finite = np.isfinite(expected)  # the norm of a row with an infinity is not a number, in whatever bits
    np.testing.assert_array_equal(results["bf16"][finite], expected[finite])
    assert not np.isfinite(results["bf16"][~finite]).any()
