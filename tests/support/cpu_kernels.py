"""CPU kernels called one at a time: op records by hand, tasks in the pieces that a thread pool might take."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.graph.activation import quantize_activation
from pyinfer.kernels_cpu.compiler import Compiler, compiler_for
from pyinfer.kernels_cpu.isa import available, make_isa
from pyinfer.kernels_cpu.matmul_float import FLOAT_BYTES
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.opcode import OP_WORDS, STEP_WORDS, StepField
from pyinfer.quant.codecs import codec_by_name

ISAS = available()
BLOCK_TYPES = tuple(BLOCK_SOURCES)
FLOAT_TYPES = tuple(FLOAT_BYTES)
Bytes = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)
_GUARD = 256  # bytes behind an array that nobody may write
_CANARY = 0xA5


def compiler(isa: str) -> Compiler:
    """The process's compiler of an ISA: kernels are compiled once for all tests."""
    return compiler_for(make_isa(isa))


def rng_of(*key: object) -> np.random.RandomState:
    """A generator seeded by the test's parameters; its stream is frozen."""
    return np.random.RandomState(abs(hash_of(repr(key))))


def hash_of(text: str) -> int:
    """FNV-1a: unlike `hash`, the same in every process."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


class Guarded:
    """64-byte aligned memory of `n_bytes`, filled with `fill`, between guards that `check` looks at."""

    def __init__(self, n_bytes: int, fill: int = 0) -> None:
        self._raw = np.full(n_bytes + 2 * _GUARD + 64, _CANARY, np.uint8)
        self._start = _GUARD + -(self._raw.ctypes.data + _GUARD) % 64
        self._end = self._start + n_bytes
        self.bytes = self._raw[self._start : self._end]
        self.bytes[:] = fill

    @property
    def address(self) -> int:
        return self.bytes.ctypes.data

    def floats(self, rows: int) -> F32:
        return self.bytes.view(np.float32).reshape(rows, -1)

    def check(self) -> None:
        outside = np.concatenate([self._raw[: self._start], self._raw[self._end :]])
        assert (outside == _CANARY).all(), "written outside of the buffer"


def step_header(**fields: int) -> npt.NDArray[np.int64]:
    """A step's words by their lower-case names."""
    step = np.zeros(STEP_WORDS, np.int64)
    step[StepField.ONE] = step[StepField.N_SPANS] = 1
    for name, value in fields.items():
        step[StepField[name.upper()]] = value
    return step


def op_record(arguments: Mapping[Any, int]) -> npt.NDArray[np.int64]:
    op = np.zeros(OP_WORDS, np.int64)
    for field, value in arguments.items():
        op[field] = value
    return op


def call(
    kernel: int,
    arguments: Mapping[Any, int],
    step: npt.NDArray[np.int64],
    n_tasks: int,
    *,
    cuts: Iterable[int] = (),
    scratch_bytes: int = 64,
) -> None:
    """Run tasks 0..n_tasks, cut at `cuts`; the last piece first, as another thread would."""
    op, scratch = op_record(arguments), Guarded(scratch_bytes, 0xFF)
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < n_tasks), n_tasks]
    for first, last in reversed(list(pairwise(bounds))):
        _KERNEL(kernel)(op.ctypes.data, step.ctypes.data, first, last, scratch.address)
    scratch.check()


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def padded_rows(x: F32, fill: float = np.nan) -> tuple[Guarded, int]:
    """A copy with rows padded to 16 columns, as stages hold them, and its stride in bytes."""
    stride = -(-x.shape[1] // 16) * 64
    memory = Guarded(stride * len(x))
    rows = memory.floats(len(x))
    rows[:] = fill
    rows[:, : x.shape[1]] = x
    return memory, stride


def a8_bytes(x: F32) -> Bytes:
    """Rows [M, K] in the layout of `activation_a8`, written from its description."""
    n_rows, width = x.shape
    a, n_blocks = quantize_activation(x), width // 32
    codes = a.codes.reshape(n_rows, n_blocks, 8, 4)
    halves = a.codes.reshape(n_rows, n_blocks, 2, 16).sum(3, dtype=np.int32)
    row_bytes = 60 * n_blocks
    out = np.empty(n_rows * row_bytes, np.uint8)
    m = 0
    while m < n_rows:
        t = next(tile for tile in (8, 4, 2, 1) if n_rows - m >= tile)
        rows = slice(m, m + t)
        records = out[m * row_bytes : (m + t) * row_bytes].reshape(n_blocks, 60 * t)
        records[:, : 32 * t] = codes[rows].transpose(1, 2, 0, 3).reshape(n_blocks, -1).view(np.uint8)
        d = a.scales[rows]
        sums = [halves[rows].sum(2, dtype=np.int32), halves[rows, :, 0], halves[rows, :, 1]]
        tail = [d, *(d * part.astype(np.float32) for part in sums), *((-part).view(np.float32) for part in sums)]
        records[:, 32 * t :] = np.ascontiguousarray(np.concatenate([part.T for part in tail], 1)).view(np.uint8)
        m += t
    return out


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.RandomState) -> Bytes:
    """Rows of random bytes under float16 scales of both signs, some zero or subnormal; floats for float types."""
    codec = codec_by_name(kind)
    if kind in FLOAT_TYPES:
        weights = rng.standard_normal((rows, columns)) * np.exp(rng.uniform(-12, 0, (rows, 1)))
        return codec.quantize(weights).reshape(rows, -1)
    source = BLOCK_SOURCES[kind]
    data = rng.randint(0, 256, (rows * columns // codec.block_size, codec.block_bytes)).astype(np.uint8)
    for at in (source.d_at, source.dm_at):
        if at is not None:
            scales = rng.standard_normal(len(data)) * rng.choice([0, 2**-20, 0.01, 0.01, 1], len(data))
            data[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def dequantized(kind: str, data: Bytes) -> npt.NDArray[np.float64]:
    return codec_by_name(kind).dequantize(data).reshape(len(data), -1).astype(np.float64)
