"""What this machine can do at best: bytes read a second, int8 and bf16 products a second."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.kernels_cpu.compiler import Body, Compiler
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import OP_WORDS, STEP_WORDS, OpField, StepField
from pyinfer.kernels_cpu.pool import Pool, Program
from pyinfer.kernels_cpu.simd import Emitter, Reg

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


def _product_body(kind: str) -> Body:
    """A task is `_DOT_LOOPS` times 32 dot products into 16 registers; the fence keeps the loop from being folded."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        zero = e.ints(0) if kind == "int8" else e.floats(0.0)
        sums = [e.var(zero) for _ in range(_ACCUMULATORS)]
        with e.loop(last, first), e.loop(_DOT_LOOPS):
            e.b.fence("seq_cst" if e.isa.name == "portable" else "acq_rel")
            left, right = e.load(scratch, e.vi), e.load(e.at(scratch, 64), e.vi)
            for i in range(_DOTS_A_LOOP):
                slot = sums[i % _ACCUMULATORS]
                e.set(slot, _product(e, kind, e.get(slot), left, right))
        total = e.get(sums[0])
        for slot in sums[1:]:
            total = (e.b.add if kind == "int8" else e.b.fadd)(total, e.get(slot))
        e.store(total, e.at(scratch, 128))

    return body


def _product(e: Emitter, kind: str, acc: Reg, left: Reg, right: Reg) -> Reg:
    return e.dot4(acc, left, right, 15) if kind == "int8" else e.dot_bfloat(acc, left, right)


class PeakMeter:
    """A pool of one size, and the timing of programs on it."""

    def __init__(self, compiler: Compiler, n_threads: int, samples: int = 5) -> None:
        self.compiler, self.n_threads, self.samples = compiler, n_threads, samples
        self.pool = Pool(n_threads, 4096, compiler.isa, MAX_OPS)
        self.step = np.zeros(STEP_WORDS, np.int64)
        self.step[StepField.ONE] = 1

    def close(self) -> None:
        self.pool.close()

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

    @staticmethod
    def record(kernel: int, tasks: int, arguments: dict[Any, int]) -> npt.NDArray[np.int64]:
        op = np.zeros(OP_WORDS, np.int64)
        op[OpField.KERNEL], op[OpField.TASKS], op[OpField.TASKS_PER], op[OpField.BARRIER] = kernel, tasks, 0, 1
        for word, value in arguments.items():
            op[word] = value
        return op

    def read_rate(self, memory: npt.NDArray[np.uint8]) -> float:
        """GB/s of reading `memory` once."""
        kernel = self.compiler.kernel("peak_read", read_body)
        tasks = len(memory) // _READ_CHUNK
        op = self.record(kernel, tasks, {_ARG: address(memory)})
        return tasks * _READ_CHUNK / self.seconds(op[None]) / 1e9

    def product_rate(self, kind: str = "int8") -> float | None:
        """10^9 operations a second, two a product, of "int8" or "bf16"; None where there is no bf16 instruction."""
        per_lane = 4
        if kind == "bf16":
            if not self.compiler.isa.bfloat:
                return None
            per_lane = 2
        kernel = self.compiler.kernel(f"peak_{kind}", _product_body(kind))
        tasks = 16 * self.n_threads
        op = self.record(kernel, tasks, {})
        operations = tasks * _DOT_LOOPS * _DOTS_A_LOOP * self.compiler.isa.lanes * per_lane * 2
        return operations / self.seconds(op[None]) / 1e9


def read_memory(n_bytes: int = 256 << 20) -> npt.NDArray[np.uint8]:
    """Memory to read: over any last-level cache that we know of but a server's, and touched."""
    memory = allocate(n_bytes)
    memory[:] = 1
    return memory
