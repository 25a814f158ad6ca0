"""Weights in the kernels' layout: where each matrix lies, and the repacking that puts it there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ModelError
from pyinfer.graph.backend import Progress
from pyinfer.graph.passes import is_bfloat
from pyinfer.kernels_cpu.compiler import Body, Compiler
from pyinfer.kernels_cpu.isa import ISA
from pyinfer.kernels_cpu.matmul_bfloat import BFLOAT_PAIRS, emit_bfloat_tile, repack_bfloat_body
from pyinfer.kernels_cpu.matmul_block import emit_block_tile, matmul_body
from pyinfer.kernels_cpu.matmul_experts import expert_matmul_body
from pyinfer.kernels_cpu.matmul_float import FLOAT_BYTES, embed_float_body, emit_float_tile, repack_float_body
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import OP_WORDS, STEP_WORDS, OpField, StepField
from pyinfer.kernels_cpu.pool import Pool, Program
from pyinfer.kernels_cpu.repack import RepackArg, embed_body, repack_body
from pyinfer.kernels_cpu.weight_format import ROWS
from pyinfer.quant.tensor import QuantTensor


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One matrix: groups of 16 rows, `n_records` records each (for float types: columns). Experts lie one behind the other."""

    offset: int  # in the arena
    n_groups: int
    n_records: int
    group_bytes: int
    kind: str  # of its kernels: the codec's name, or BFLOAT_PAIRS


def check_supported(weight: QuantTensor) -> None:
    """ModelError for a type or shape without a kernel."""
    kind, columns = weight.codec.name, weight.shape[-1]
    if kind not in BLOCK_SOURCES and kind not in FLOAT_BYTES:
        known = ", ".join((*FLOAT_BYTES, *BLOCK_SOURCES))
        raise ModelError(f"tensor {weight.name!r} is {kind}, which has no CPU kernel yet; known are {known}")
    if len(weight.shape) == 3 and weight.shape[1] % ROWS:
        raise ModelError(
            f"tensor {weight.name!r} has experts of {weight.shape[1]} rows; the CPU kernels need a multiple of {ROWS}"
        )
    if columns % 16:
        raise ModelError(f"tensor {weight.name!r} has rows of {columns} columns; the CPU kernels need a multiple of 16")


def _tile_of(kind: str) -> Any:
    if kind == BFLOAT_PAIRS:
        return emit_bfloat_tile
    return emit_float_tile(kind) if kind in FLOAT_BYTES else emit_block_tile(BLOCK_SOURCES[kind])


def matmul_kernel(compiler: Compiler, kind: str) -> int:
    return compiler.kernel(f"matmul_{kind.lower()}", matmul_body(_tile_of(kind), kind.lower()))


def expert_matmul_kernel(compiler: Compiler, kind: str) -> int:
    return compiler.kernel(f"expert_matmul_{kind.lower()}", expert_matmul_body(_tile_of(kind), kind.lower()))


def embed_kernel(compiler: Compiler, kind: str) -> int:
    body: Body = embed_float_body(kind) if kind in FLOAT_BYTES else embed_body(BLOCK_SOURCES[kind])
    return compiler.kernel(f"embed_{kind.lower()}", body)


def repack_kernel(compiler: Compiler, kind: str) -> int:
    if kind == BFLOAT_PAIRS:
        return compiler.kernel("repack_bf16_pairs", repack_bfloat_body())
    body: Body = repack_float_body(kind) if kind in FLOAT_BYTES else repack_body(BLOCK_SOURCES[kind])
    return compiler.kernel(f"repack_{kind.lower()}", body)


class WeightArena:
    """One mapping for all matrices of a stage. `place` them all, then `load` fills it."""

    def __init__(self, weights: Iterable[QuantTensor], isa: ISA) -> None:
        self._placed: dict[int, PackedWeight] = {}
        self._tensors: list[QuantTensor] = []
        end = 0
        for weight in weights:
            if id(weight) not in self._placed:
                check_supported(weight)
                packed = _layout(weight, end, isa)
                self._placed[id(weight)] = packed
                self._tensors.append(weight)
                end = -(-(packed.offset + packed.n_groups * packed.group_bytes) // 64) * 64
        self.n_bytes = end
        self._memory = allocate(end + 64)

    def __getitem__(self, weight: QuantTensor) -> PackedWeight:
        return self._placed[id(weight)]

    def address(self, weight: QuantTensor) -> int:
        return address(self._memory) + self[weight].offset

    @property
    def description(self) -> str:
        """What lies where: equal for equal layouts of the same tensors."""
        places = (f"{weight.name} {weight.shape} {self[weight]}" for weight in self._tensors)
        return "\n".join(places)

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """All matrices, one behind the other."""
        return self._memory[: self.n_bytes]

    def release_files(self) -> None:
        """Let go of the pages of the file."""
        for weight in self._tensors:
            weight.release()

    def load(self, pool: Pool, compiler: Compiler, progress: Progress | None = None) -> None:
        """Repack every tensor on all threads, letting go of the file's pages behind it."""
        done, total = 0, sum(weight.n_bytes for weight in self._tensors)
        step = np.zeros(STEP_WORDS, np.int64)
        step[StepField.ONE] = 1
        for weight in self._tensors:
            packed = self[weight]
            op = np.zeros((1, OP_WORDS), np.int64)
            op[0, OpField.KERNEL] = repack_kernel(compiler, packed.kind)
            op[0, OpField.TASKS], op[0, OpField.TASKS_PER] = packed.n_groups, StepField.ONE
            op[0, RepackArg.SOURCE] = address(weight.data)
            op[0, RepackArg.ROW_BYTES] = weight.data.shape[-1]
            op[0, RepackArg.N_ROWS] = len(weight.data)
            op[0, RepackArg.TARGET] = self.address(weight)
            op[0, RepackArg.N_RECORDS] = packed.n_records
            pool.run(Program(op, step))
            weight.release()
            done += weight.n_bytes
            if progress is not None:
                progress("loading weights", done / total)


def _layout(weight: QuantTensor, offset: int, isa: ISA) -> PackedWeight:
    rows, columns = len(weight.data), weight.shape[-1]
    codec = weight.codec.name
    kind = BFLOAT_PAIRS if isa.bfloat and is_bfloat(weight) else codec
    if codec in FLOAT_BYTES:
        n_records, record_bytes = columns, ROWS * FLOAT_BYTES[codec]
    else:
        fmt = BLOCK_SOURCES[codec].format
        n_records, record_bytes = columns // fmt.columns, fmt.record_bytes
    return PackedWeight(offset, -(-rows // ROWS), n_records, n_records * record_bytes, kind)
