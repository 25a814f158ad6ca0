"""How near the CPU's matmul kernels come to what the machine can do.

    python benchmarks/roofline.py --threads 1 2 --types Q4_K Q8_0

There are two limits: how fast memory can be read, and how many int8 products the dot instruction of this ISA does
when everything is in registers. Each weight type runs with a few shapes [rows, columns]: with 1 activation row and
weights that are in no cache, as in decode, in GB/s of repacked weights; with many rows, as in a prompt, in GOP/s (two
operations a weight and row). Its share is that of the limits measured right before it, because they move with what else
the machine does. BF16 is held against the peak of bfloat16 where the CPU has one, other float types against none. The
last column is the repacking at load, in GB/s of the file.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from machine_state import describe_machine

from pyinfer.kernels_cpu.activation_a8 import row_bytes
from pyinfer.kernels_cpu.compiler import compiler_for
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.matmul_bfloat import BFLOAT_PAIRS
from pyinfer.kernels_cpu.matmul_block import MatMulArg
from pyinfer.kernels_cpu.matmul_float import FLOAT_BYTES
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.peak import MAX_OPS, PeakMeter, read_memory
from pyinfer.kernels_cpu.pool import Program
from pyinfer.kernels_cpu.row_ops import RowArg, quantize_body
from pyinfer.kernels_cpu.weights import WeightArena, matmul_kernel
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
COLD_BYTES = 256 << 20  # read between two uses of a weight: over any last-level cache that we know of but a server's


@dataclass(frozen=True)
class Shape:
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


class MatMulBench:
    """One weight type and shape: enough copies of a random matrix that no cache holds them."""

    def __init__(self, bench: PeakMeter, kind: str, shape: Shape, n_rows: int) -> None:
        self.bench, self.kind, self.shape, self.n_rows = bench, kind, shape, n_rows
        codec = codec_by_name(kind)
        rng = np.random.default_rng(0)
        some = codec.quantize(rng.normal(0, 0.02, (16, shape.columns)).astype(np.float32))
        data = np.tile(some, (-(-shape.rows // 16), 1))[: shape.rows]
        n_copies = min(MAX_OPS, max(1, -(-COLD_BYTES // data.nbytes)))
        self.copies = [QuantTensor(str(i), codec, (shape.rows, shape.columns), data) for i in range(n_copies)]
        self.arena = WeightArena(self.copies, bench.compiler.isa)
        self.arena.load(bench.pool, bench.compiler)  # compiles, and touches every page of the arena
        start = time.perf_counter()
        self.arena.load(bench.pool, bench.compiler)
        self.repack_rate = n_copies * data.nbytes / (time.perf_counter() - start) / 1e9  # GB/s of the file's bytes
        self.kernels = self.arena[self.copies[0]].kind
        self.out_stride = -(-shape.rows // 16) * 64
        self.out = allocate(self.out_stride * n_rows)
        self.x, self.x_stride = self._activations(rng)

    def _activations(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], int]:
        columns = self.shape.columns
        floats = allocate(4 * columns * self.n_rows)
        floats.view(np.float32)[:] = rng.normal(0, 1, columns * self.n_rows)
        if self.kernels == BFLOAT_PAIRS:
            floats.view(np.uint32)[:] >>= 16  # two bfloat16 in each, one of them zero
            return floats, 2 * columns
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
        kernel = self.bench.compiler.kernel("quantize", quantize_body("a8"))
        self.bench.pool.run(Program(self.bench.record(kernel, n_rows, arguments)[None], self.bench.step))

    def _records(self, copies: list[QuantTensor]) -> npt.NDArray[np.int64]:
        kernel = matmul_kernel(self.bench.compiler, self.kernels)
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
    memory = read_memory(COLD_BYTES)
    for n in arguments.threads:
        bench = PeakMeter(compiler, n, arguments.samples)
        bf16 = bench.product_rate("bf16")
        print(f"{n} threads: read {bench.read_rate(memory):.1f} GB/s, int8 {bench.product_rate():.0f} GOP/s, ", end="")
        print("no bf16 instruction" if bf16 is None else f"bf16 {bf16:.0f} GFLOP/s")
        bench.close()
    print(f"{describe_machine()}; {compiler.isa.name}, medians of {arguments.samples}\n")
    rows = arguments.rows
    print(
        f"| type | shape | threads | read GB/s | 1 row GB/s | share | peak GOP/s | {rows} rows GOP/s | share | repack GB/s |"
    )
    print("|---|---|" + "---:|" * 8)
    for kind in arguments.types:
        for shape in arguments.shapes:
            for n in arguments.threads:
                bench = PeakMeter(compiler, n, arguments.samples)
                try:
                    _print_row(bench, kind, shape, rows, memory)
                finally:
                    bench.close()
    return 0


def _print_row(bench: PeakMeter, kind: str, shape: Shape, n_rows: int, memory: npt.NDArray[np.uint8]) -> None:
    matmul = MatMulBench(bench, kind, shape, n_rows)
    is_bfloat = matmul.kernels == BFLOAT_PAIRS
    read, peak = bench.read_rate(memory), bench.product_rate("bf16" if is_bfloat else "int8") or 0.0
    decode, prompt = matmul.decode_rate(), matmul.prompt_rate()
    cells = [kind, str(shape), str(bench.n_threads), f"{read:.1f}", f"{decode:.1f}", share(decode, read)]
    cells += [f"{peak:.0f}", f"{prompt:.0f}", "" if kind in FLOAT_BYTES and not is_bfloat else share(prompt, peak)]
    cells.append(f"{matmul.repack_rate:.1f}")
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
