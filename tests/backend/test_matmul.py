"""Every weight type's repack and matmul, on every ISA, against float64 over the codec's weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import (
    BLOCK_TYPES,
    F32,
    FLOAT_TYPES,
    ISAS,
    Bytes,
    Guarded,
    a8_bytes,
    call,
    compiler,
    dequantized,
    padded_rows,
    random_blocks,
    rng_of,
    step_header,
)

from pyinfer.graph.activation import quantize_activation
from pyinfer.kernels_cpu.matmul_block import MatMulArg
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.repack import RepackArg
from pyinfer.kernels_cpu.weights import matmul_kernel, repack_kernel
from pyinfer.quant.codecs import codec_by_name

pytestmark = pytest.mark.backend

TYPES = (*BLOCK_TYPES, *FLOAT_TYPES)
MAX_ROWS = 17  # activation rows: two tiles of 8 and one
SHAPES = {  # weight rows and columns
    32: ((16, 32), (37, 64), (5, 288), (48, 576), (33, 640), (3, 8960)),
    256: ((16, 256), (37, 512), (21, 2048), (3, 8960)),
    1: ((16, 16), (37, 48), (5, 80), (33, 576), (3, 8960)),
}
CASES = [
    (kind, shape)
    for kind in TYPES
    for shape in SHAPES[1 if kind in FLOAT_TYPES else BLOCK_SOURCES[kind].format.columns]
]
BY_CASE = pytest.mark.parametrize("kind, shape", CASES, ids=lambda v: v if isinstance(v, str) else f"{v[0]}x{v[1]}")
BY_ISA = pytest.mark.parametrize("isa", ISAS)


@dataclass
class Matrix:
    """A repacked weight with its oracle."""

    isa: str
    kind: str
    data: Bytes
    packed: Guarded
    n_records: int
    exact: npt.NDArray[np.float64]

    @property
    def n_groups(self) -> int:
        return -(-len(self.data) // 16)

    @property
    def stride(self) -> int:
        """Bytes of an output row: rows of weights, padded to whole groups."""
        return self.n_groups * 64

    def inputs(self, x: F32) -> tuple[Guarded, int, npt.NDArray[np.float64]]:
        """Memory of activation rows, its row bytes and the numbers that it stands for."""
        if self.kind in FLOAT_TYPES:
            memory, stride = padded_rows(x)
            return memory, stride, x.astype(np.float64)
        content = a8_bytes(x)
        memory = Guarded(len(content))
        memory.bytes[:] = content
        a = quantize_activation(x)
        exact = a.codes.astype(np.float64) * np.repeat(a.scales.astype(np.float64), 32, axis=1)
        return memory, len(content) // len(x), exact

    def multiply(
        self,
        x: F32,
        *,
        bias: F32 | None = None,
        residual: F32 | None = None,
        in_place: bool = False,
        row_block: int = 64,
        cuts: tuple[int, ...] = (),
    ) -> F32:
        """x @ weight.T + bias + residual by the kernel: float32 [len(x), rows]."""
        memory, row_bytes, _ = self.inputs(x)
        n_rows = len(self.data)
        out = Guarded(self.stride * len(x), 0xFF)
        arguments = {
            MatMulArg.WEIGHTS: self.packed.address, MatMulArg.GROUP_BYTES: len(self.packed.bytes) // self.n_groups,
            MatMulArg.N_RECORDS: self.n_records, MatMulArg.X: memory.address, MatMulArg.X_ROW_BYTES: row_bytes,
            MatMulArg.OUT: out.address, MatMulArg.OUT_STRIDE: self.stride,
            MatMulArg.ROWS_FIELD: StepField.N_OUTPUTS, MatMulArg.ROW_BLOCK: row_block,
        }  # fmt: skip
        keep = []
        if bias is not None:
            padded, _ = padded_rows(bias[None])
            keep.append(padded)
            arguments[MatMulArg.BIAS] = padded.address
        if residual is not None:
            padded, stride = padded_rows(residual)
            if in_place:
                out = padded
                arguments |= {MatMulArg.OUT: padded.address, MatMulArg.OUT_STRIDE: stride}
            keep.append(padded)
            arguments |= {MatMulArg.RESIDUAL: padded.address, MatMulArg.RESIDUAL_STRIDE: stride}
        step = step_header(n_outputs=len(x), n_tokens=1 << 40)
        call(matmul_kernel(compiler(self.isa), self.kind), arguments, step, self.n_groups, cuts=cuts)
        for buffer in (memory, out, self.packed, *keep):
            buffer.check()
        rows = out.floats(len(x))
        assert bias is not None or residual is not None or (rows[:, n_rows:] == 0).all(), "padding holds a weight"
        return rows[:, :n_rows].copy()


def repack(isa: str, kind: str, shape: tuple[int, int], byte: int | None = None) -> Matrix:
    """Random weights, or blocks of nothing but `byte` under scales of 1, through the repack kernel."""
    rows, columns = shape
    data = random_blocks(kind, rows, columns, rng_of(kind, shape))
    if byte is not None:
        data = uniform_blocks(kind, data.size // codec_by_name(kind).block_bytes, byte).reshape(rows, -1)
    if kind in FLOAT_TYPES:
        n_records, record_bytes = columns, 16 * data.shape[1] // columns
    else:
        fmt = BLOCK_SOURCES[kind].format
        n_records, record_bytes = columns // fmt.columns, fmt.record_bytes
    source = Guarded(data.size)  # what follows the last row is not zero
    source.bytes[:] = data.ravel()
    n_groups = -(-rows // 16)
    packed = Guarded(n_groups * n_records * record_bytes)
    arguments = {
        RepackArg.SOURCE: source.address, RepackArg.ROW_BYTES: data.shape[1], RepackArg.N_ROWS: rows,
        RepackArg.TARGET: packed.address, RepackArg.N_RECORDS: n_records,
    }  # fmt: skip
    call(repack_kernel(compiler(isa), kind), arguments, step_header(), n_groups, cuts=range(1, n_groups))
    packed.check()
    return Matrix(isa, kind, data, packed, n_records, dequantized(kind, data))


def uniform_blocks(kind: str, n: int, byte: int) -> Bytes:
    source = BLOCK_SOURCES[kind]
    blocks = np.full((n, codec_by_name(kind).block_bytes), byte, np.uint8)
    for at in (source.d_at, source.dm_at):
        if at is not None:
            blocks[:, at : at + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    return blocks


def activations(rows: int, columns: int) -> F32:
    rng = rng_of("x", rows, columns)
    x = rng.standard_normal((rows, columns)) * np.exp(rng.uniform(-3, 3, (rows, 1)))
    return x.astype(np.float32)


def assert_close(result: F32, exact: npt.NDArray[np.float64], size: npt.NDArray[np.float64]) -> None:
    """Errors relative to `size`, the sum of the magnitudes that were added: float32 rounding, nothing more."""
    np.testing.assert_array_less(np.abs(result - exact), 1e-6 * size + 1e-30)


@BY_ISA
@BY_CASE
def test_results_equal_float64_for_any_number_of_rows(isa: str, kind: str, shape: tuple[int, int]) -> None:
    matrix = repack(isa, kind, shape)
    x = activations(MAX_ROWS, shape[1])
    most = matrix.multiply(x)
    _, _, exact_x = matrix.inputs(x)
    assert_close(most, exact_x @ matrix.exact.T, np.abs(exact_x) @ np.abs(matrix.exact).T)
    for n in range(1, MAX_ROWS):
        np.testing.assert_array_equal(matrix.multiply(x[:n]), most[:n], err_msg=f"{n} rows")
        np.testing.assert_array_equal(matrix.multiply(x[n:]), most[n:], err_msg=f"rows from {n}")


@BY_ISA
@pytest.mark.parametrize("kind", TYPES)
def test_bias_and_residual_are_added_in_this_order(isa: str, kind: str) -> None:
    columns = 256 if kind not in FLOAT_TYPES else 48
    matrix = repack(isa, kind, (37, columns))
    x = activations(11, columns)
    rng = rng_of("addends")
    bias, residual = rng.standard_normal(37).astype(np.float32), rng.standard_normal((11, 37)).astype(np.float32)
    plain = matrix.multiply(x)
    np.testing.assert_array_equal(matrix.multiply(x, bias=bias), plain + bias)
    np.testing.assert_array_equal(matrix.multiply(x, residual=residual), plain + residual)
    both = plain + bias + residual
    np.testing.assert_array_equal(matrix.multiply(x, bias=bias, residual=residual), both)
    np.testing.assert_array_equal(matrix.multiply(x, bias=bias, residual=residual, in_place=True), both)


@BY_ISA
@pytest.mark.parametrize("kind", TYPES)
def test_no_cut_of_rows_or_groups_changes_a_bit(isa: str, kind: str) -> None:
    columns = 512 if kind not in FLOAT_TYPES else 80
    matrix = repack(isa, kind, (75, columns))
    x = activations(45, columns)
    whole = matrix.multiply(x)
    for row_block in (8, 16, 40):
        np.testing.assert_array_equal(matrix.multiply(x, row_block=row_block), whole)
    np.testing.assert_array_equal(matrix.multiply(x, row_block=16, cuts=(1, 3, 4)), whole)


@BY_ISA
@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("byte", [0x00, 0x80, 0xFF])
def test_the_largest_codes_do_not_saturate(isa: str, kind: str, byte: int) -> None:
    matrix = repack(isa, kind, (16, 256), byte=byte)
    x = np.ones((6, 256), np.float32)
    x[1] = -1
    x[2, ::2] = -1
    x[3, 1::4] = x[3, 2::4] = -1
    x[4, 16:] = 0
    result = matrix.multiply(x)
    _, _, exact_x = matrix.inputs(x)
    # what cancels are codes and the offset or minimum taken off them, so the size is that of the largest row
    size = np.abs(exact_x).sum(1, keepdims=True) * np.abs(largest_weight(matrix))
    assert_close(result, exact_x @ matrix.exact.T, np.broadcast_to(size, result.shape))


def largest_weight(matrix: Matrix) -> float:
    """A bound on code * scale and on the minimum, with both scales 1."""
    fmt = BLOCK_SOURCES[matrix.kind].format
    return float(((1 << fmt.bits) + 1) * {"none": 1, "u4u4": 15, "u6u6": 63, "i8": 128}[fmt.scales])


@BY_ISA
@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_zeros_give_the_bias(isa: str, kind: str) -> None:
    matrix = repack(isa, kind, (21, 256))
    bias = np.arange(21, dtype=np.float32)
    x = activations(3, 256)
    x[1] = 0
    np.testing.assert_array_equal(matrix.multiply(x, bias=bias)[1], bias)
