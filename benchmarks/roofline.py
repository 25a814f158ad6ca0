"""How near the CPU's matmul kernels come to what the machine can do.

    python benchmarks/roofline.py --threads 1 2 --types Q4_K Q8_0

There are two limits: how fast memory can be read, and how many int8 products the dot instruction of this ISA does
when everything is in registers. Each weight type runs with a few shapes [rows, columns]: with 1 activation row and
weights that are in no cache, as in decode, in GB/s of repacked weights; with many rows, as in a prompt, in GOP/s (two
operations a weight and row). Its share is that of the limits measured right before it, because they move with what else
the machine does. Float types have no share of the int8 peak.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from machine_state import describe_machine

from pyinfer.kernels_cpu.activation_a8 import row_bytes
from pyinfer.kernels_cpu.compiler import Compiler, compiler_for
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.matmul_block import MatMulArg
from pyinfer.kernels_cpu.matmul_float import FLOAT_BYTES
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import OP_WORDS, STEP_WORDS, OpField, StepField
from pyinfer.kernels_cpu.pool import Pool, Program
from pyinfer.kernels_cpu.row_ops import RowArg, quantize_body
from pyinfer.kernels_cpu.simd import Emitter, Reg
from pyinfer.kernels_cpu.weights import WeightArena, matmul_kernel
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
COLD_BYTES = 256 << 20  # read between two uses of a weight: over any last-level cache that we know of but a server's
MAX_OPS = 256
_READ_CHUNK = 64 << 10
_ACCUMULATORS, _DOTS_A_LOOP, _DOT_LOOPS = 16, 32, 100_000
_ARG = int(OpField.ARGS)


def read_body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
    """Loads everything once; a task is 64 KiB. The xor goes to the scratch so that the loads stay."""
    sums = [e.var(e.ints(0)) for _ in range(8)]
    vector_bytes = 4 * e.L
    with e.loop(last, first) as task:
        chunk = e.at(e.ptr(e.field(op, _ARG)), e.mul(task, _READ_CHUNK))
        with e.loop(_READ_CHUNK, 0, 16 * vector_bytes) as at:
            for i in range(16):
                value = e.load(e.at(e.at(chunk, at), i * vector_bytes), e.vi)
                e.set(sums[i % 8], e.b.xor(e.get(sums[i % 8]), value))
    total = e.get(sums[0])
    for slot in sums[1:]:
        total = e.b.xor(total, e.get(slot))
    e.store(total, scratch)


def dot_body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
    """A task is `_DOT_LOOPS` times 32 dot products into 16 registers; the fence keeps the loop from being folded."""
    sums = [e.var(e.ints(0)) for _ in range(_ACCUMULATORS)]
    with e.loop(last, first), e.loop(_DOT_LOOPS):
        e.b.fence("seq_cst" if e.isa.name == "portable" else "acq_rel")
        left, right = e.load(scratch, e.vi), e.load(e.at(scratch, 64), e.vi)
        for i in range(_DOTS_A_LOOP):
            slot = sums[i % _ACCUMULATORS]
            e.set(slot, e.dot4(e.get(slot), left, right, 15))
    total = e.get(sums[0])
    for slot in sums[1:]:
        total = e.b.add(total, e.get(slot))
    e.store(total, e.at(scratch, 128))


class Bench:
    """A pool of one size, and the timing of programs on it."""

    def __init__(self, compiler: Compiler, n_threads: int, samples: int) -> None:
        self.compiler, self.n_threads, self.samples = compiler, n_threads, samples
        self.pool = Pool(n_threads, 4096, compiler.isa, MAX_OPS)
        self.step = np.zeros(STEP_WORDS, np.int64)
        self.step[StepField.ONE] = 1

    def seconds(self, ops: npt.NDArray[np.int64]) -> float:
        """Median time of one run of these op records."""
        program = Program(ops, self.step)
        self.pool.run(program)
        times = []
        for _ in range(self.samples):
            begin = time.perf_counter()
            self.pool.run(program)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def record(self, kernel: int, tasks: int, arguments: dict[int, int]) -> npt.NDArray[np.int64]:
        op = np.zeros(OP_WORDS, np.int64)
        op[OpField.KERNEL], op[OpField.TASKS], op[OpField.TASKS_PER], op[OpField.BARRIER] = kernel, tasks, 0, 1
        for word, value in arguments.items():
            op[word] = value
        return op

    def read_rate(self, memory: npt.NDArray[np.uint8]) -> float:
        """GB/s."""
        kernel = self.compiler.kernel("roofline_read", read_body)
        tasks = len(memory) // _READ_CHUNK
        op = self.record(kernel, tasks, {_ARG: address(memory)})
        return tasks * _READ_CHUNK / self.seconds(op[None]) / 1e9

    def dot_rate(self) -> float:
        """GOP/s, two a product."""
        kernel = self.compiler.kernel("roofline_dot", dot_body)
        tasks = 16 * self.n_threads
        op = self.record(kernel, tasks, {})
        operations = tasks * _DOT_LOOPS * _DOTS_A_LOOP * self.compiler.isa.lanes * 4 * 2
        return operations / self.seconds(op[None]) / 1e9


@dataclass(frozen=True)
class Shape:
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


class MatMulBench:
    """One weight type and shape: enough copies of a random matrix that no cache holds them."""

    def __init__(self, bench: Bench, kind: str, shape: Shape, n_rows: int) -> None:
        self.bench, self.kind, self.shape, self.n_rows = bench, kind, shape, n_rows
        codec = codec_by_name(kind)
        rng = np.random.default_rng(0)
        some = codec.quantize(rng.normal(0, 0.02, (16, shape.columns)).astype(np.float32))
        data = np.tile(some, (-(-shape.rows // 16), 1))[: shape.rows]
        n_copies = min(MAX_OPS, max(1, -(-COLD_BYTES // data.nbytes)))
        self.copies = [QuantTensor(str(i), codec, (shape.rows, shape.columns), data) for i in range(n_copies)]
        self.arena = WeightArena(self.copies)
        self.arena.load(bench.pool, bench.compiler)
        self.out_stride = -(-shape.rows // 16) * 64
        self.out = allocate(self.out_stride * n_rows)
        self.x, self.x_stride = self._activations(rng)

    def _activations(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], int]:
        columns = self.shape.columns
        floats = allocate(4 * columns * self.n_rows)
        floats.view(np.float32)[:] = rng.normal(0, 1, columns * self.n_rows)
        if self.kind in FLOAT_BYTES:
            return floats, 4 * columns
        return allocate(row_bytes(columns) * self.n_rows), row_bytes(columns)

    def _fill(self, n_rows: int) -> None:
        """Activations of `n_rows` rows in the kernel's layout, which depends on their number."""
        self.bench.step[StepField.N_TOKENS] = n_rows
        if self.kind in FLOAT_BYTES:
            return
        columns = self.shape.columns
        floats = np.random.default_rng(1).normal(0, 1, (n_rows, columns)).astype(np.float32)
        arguments: dict[int, int] = {
            RowArg.X: address(floats), RowArg.X_STRIDE: 4 * columns, RowArg.OUT: address(self.x),
            RowArg.OUT_STRIDE: self.x_stride, RowArg.WIDTH: columns, RowArg.N_PARTS: 1,
            RowArg.ROWS_FIELD: StepField.N_TOKENS,
        }  # fmt: skip
        kernel = self.bench.compiler.kernel("quantize", quantize_body())
        self.bench.pool.run(Program(self.bench.record(kernel, n_rows, arguments)[None], self.bench.step))

    def _records(self, copies: list[QuantTensor]) -> npt.NDArray[np.int64]:
        kernel = matmul_kernel(self.bench.compiler, self.kind)
        records = []
        for copy in copies:
            packed = self.arena[copy]
            arguments: dict[int, int] = {
                MatMulArg.WEIGHTS: self.arena.address(copy), MatMulArg.GROUP_BYTES: packed.group_bytes,
                MatMulArg.N_RECORDS: packed.n_records, MatMulArg.X: address(self.x),
                MatMulArg.X_ROW_BYTES: self.x_stride, MatMulArg.OUT: address(self.out),
                MatMulArg.OUT_STRIDE: self.out_stride, MatMulArg.ROWS_FIELD: StepField.N_TOKENS,
                MatMulArg.ROW_BLOCK: max(8, (512 << 10) // self.x_stride // 8 * 8),
            }  # fmt: skip
            records.append(self.bench.record(kernel, packed.n_groups, arguments))
        return np.stack(records)

    def decode_rate(self) -> float:
        """GB/s of repacked weights with one row, all copies in turn."""
        self._fill(1)
        weights = sum(self.arena[copy].n_groups * self.arena[copy].group_bytes for copy in self.copies)
        return weights / self.bench.seconds(self._records(self.copies)) / 1e9

    def prompt_rate(self) -> float:
        """GOP/s with `n_rows` rows."""
        self._fill(self.n_rows)
        operations = 2 * self.n_rows * self.shape.rows * self.shape.columns
        return operations / self.bench.seconds(self._records(self.copies[:1])) / 1e9


def limits(bench: Bench, memory: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """(read GB/s, int8 GOP/s) at this moment."""
    return bench.read_rate(memory), bench.dot_rate()


def share(value: float, limit: float) -> str:
    return f"{100 * value / limit:.0f} %"


def parse_shape(text: str) -> Shape:
    rows, _, columns = text.partition("x")
    return Shape(int(rows), int(columns))


def parse_arguments() -> argparse.Namespace:
    every = [*BLOCK_SOURCES, *FLOAT_BYTES]
    parser = argparse.ArgumentParser(description="CPU matmul kernels against the machine's limits.")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--types", nargs="+", choices=every, default=every, metavar="TYPE", help=" ".join(every))
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=[Shape(*s) for s in SHAPES], metavar="ROWSxCOLUMNS"
    )
    parser.add_argument("--rows", type=int, default=64, help="activation rows of the prompt test (default: 64)")
    parser.add_argument("--samples", type=int, default=5, help="samples of each figure (default: 5)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    compiler = compiler_for(current_isa())
    memory = allocate(COLD_BYTES)
    memory[:] = 1
    print(f"{describe_machine()}; {compiler.isa.name}, medians of {arguments.samples}\n")
    rows = arguments.rows
    print(f"| type | shape | threads | read GB/s | 1 row GB/s | share | int8 peak GOP/s | {rows} rows GOP/s | share |")
    print("|---|---|" + "---:|" * 7)
    for kind in arguments.types:
        for shape in arguments.shapes:
            for n in arguments.threads:
                bench = Bench(compiler, n, arguments.samples)
                try:
                    _print_row(bench, kind, shape, rows, memory)
                finally:
                    bench.pool.close()
    return 0


def _print_row(bench: Bench, kind: str, shape: Shape, n_rows: int, memory: npt.NDArray[np.uint8]) -> None:
    matmul = MatMulBench(bench, kind, shape, n_rows)
    read, peak = limits(bench, memory)
    decode, prompt = matmul.decode_rate(), matmul.prompt_rate()
    cells = [kind, str(shape), str(bench.n_threads), f"{read:.1f}", f"{decode:.1f}", share(decode, read)]
    cells += [f"{peak:.0f}", f"{prompt:.0f}", "" if kind in FLOAT_BYTES else share(prompt, peak)]
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
