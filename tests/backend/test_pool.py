"""The thread pool: every task once, barriers that hold, threads that sleep, wake and leave."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import compiler, hash_of

from pyinfer.kernels_cpu.control import BENCHED_UNTIL, RECORD, THREADS
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.opcode import OP_WORDS, STEP_WORDS, OpField, StepField
from pyinfer.kernels_cpu.pool import Pool, Program
from pyinfer.kernels_cpu.simd import i64

# a hang in native code answers no signal
pytestmark = [pytest.mark.backend, pytest.mark.timeout(120, method="thread")]

MAX_OPS = 12
SIZE = 300  # tasks of an op at most
_VERSION = f"{hash_of(Path(__file__).read_text()):x}"  # compiled kernels are kept by name
Int64 = npt.NDArray[np.int64]


class MixArg(IntEnum):
    """target[t] = source[n - 1 - t] * 3 + source[t] + t, which needs all of the op before."""

    SOURCE = OpField.ARGS
    TARGET = OpField.ARGS + 1
    N = OpField.ARGS + 2
    DONE = OpField.ARGS + 3  # counts the times each task was run
    DELAY = OpField.ARGS + 4  # of task 0: nobody may go on without it


def _mix(e: Any, op: Any, step: Any, first: Any, last: Any, scratch: Any) -> None:
    source, target, done = (e.ptr(e.field(op, i)) for i in (MixArg.SOURCE, MixArg.TARGET, MixArg.DONE))
    n = e.field(op, MixArg.N)
    word = lambda base, i: e.at(base, e.mul(i, 8))  # noqa: E731
    with e.loop(last, first) as t:
        with e.when(e.b.icmp_signed("==", t, e.c(0))), e.loop(e.field(op, MixArg.DELAY)):
            e.b.fence("seq_cst")
        e.store(t, scratch, 8)  # a scratch of one's own: nobody else's number comes back
        mirrored = e.load(word(source, e.sub(e.sub(n, 1), t)), i64, 8)
        mixed = e.add(e.add(e.mul(mirrored, 3), e.load(word(source, t), i64, 8)), e.load(scratch, i64, 8))
        e.store(mixed, word(target, t), 8)
        e.store(e.add(e.load(word(done, t), i64, 8), 1), word(done, t), 8)


@cache
def mix_kernel() -> int:
    return compiler(current_isa().name).kernel(f"test_mix_{_VERSION}", _mix)


@contextmanager
def opened(n_threads: int) -> Iterator[Pool]:
    pool = Pool(n_threads, 64, current_isa(), MAX_OPS)
    try:
        yield pool
    finally:
        close_in_time(pool)


def close_in_time(pool: Pool) -> None:
    """A close that hangs fails the test instead of the whole run."""
    closer = threading.Thread(target=pool.close, daemon=True)
    closer.start()
    closer.join(60)
    assert not closer.is_alive(), "close() hangs"


class Chains:
    """A random program: two chains of ops side by side, with a barrier between pairs."""

    def __init__(self, rng: np.random.RandomState) -> None:
        self.n_pairs = int(rng.randint(1, MAX_OPS // 2 + 1))
        self.n = [int(rng.choice([0, 1, 2, 3, 17, SIZE])) for _ in range(2)]
        self.step = np.zeros(STEP_WORDS, np.int64)
        self.step[StepField.ONE] = 1
        self.step[StepField.N_TOKENS] = self.n[1]
        self.buffers = rng.randint(-1000, 1000, (2, self.n_pairs + 1, SIZE))
        self.done = np.zeros((2, self.n_pairs, SIZE), np.int64)
        ops = np.zeros((2 * self.n_pairs, OP_WORDS), np.int64)
        for i in range(self.n_pairs):
            for chain in range(2):
                op = ops[2 * i + chain]
                op[OpField.KERNEL] = mix_kernel()
                op[OpField.TASKS], op[OpField.TASKS_PER] = (self.n[0], StepField.ONE) if not chain else (
                    1, StepField.N_TOKENS,
                )  # fmt: skip
                # the first of a pair that has tasks waits for the pair before: one without tasks waits for nothing
                op[OpField.BARRIER] = chain == (0 if self.n[0] else 1)
                op[MixArg.SOURCE] = self.buffers[chain, i].ctypes.data
                op[MixArg.TARGET] = self.buffers[chain, i + 1].ctypes.data
                op[MixArg.DELAY] = rng.choice([0, 0, 5000])
                op[MixArg.N], op[MixArg.DONE] = self.n[chain], self.done[chain, i].ctypes.data
        self.program = Program(ops, self.step)

    def check(self) -> None:
        for chain, n in enumerate(self.n):
            for i in range(self.n_pairs):
                source = self.buffers[chain, i, :n]
                expected = source[::-1] * 3 + source + np.arange(n)
                np.testing.assert_array_equal(self.buffers[chain, i + 1, :n], expected)
            assert (self.done[chain, :, :n] == 1).all() and (self.done[chain, :, n:] == 0).all()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
def test_many_small_programs_back_to_back(n_threads: int) -> None:
    rng = np.random.RandomState(n_threads)
    with opened(n_threads) as pool:
        for _ in range(30):
            many = [Chains(rng) for _ in range(40)]
            seat_all(pool)
            for chains in many:
                pool.run(chains.program)
            for chains in many:
                chains.check()


@pytest.mark.parametrize("n_threads", [2, 3, 4])
def test_programs_with_gaps(n_threads: int) -> None:
    """Workers that spin, that are about to fall asleep and that are asleep."""
    rng = np.random.RandomState(n_threads)
    with opened(n_threads) as pool:
        for _ in range(150):
            chains = Chains(rng)
            seat_all(pool)
            pool.run(chains.program)
            chains.check()
            time.sleep(float(rng.choice([0, 1e-4, 3e-4, 6e-4, 1e-3, 2e-2], p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1])))


def seat_all(pool: Pool) -> None:
    """Let no thread sit out, however busy the machine is."""
    for thread in range(1, pool.n_threads):
        bench(pool, thread, 0)


def test_pools_side_by_side() -> None:
    """Four pools with more threads than the machine has cores, each driven by a thread of its own."""
    failures: list[BaseException] = []

    def drive(seed: int) -> None:
        try:
            rng = np.random.RandomState(seed)
            with opened(2) as pool:
                for _ in range(40):
                    chains = Chains(rng)
                    pool.run(chains.program)
                    chains.check()
        except BaseException as error:
            failures.append(error)

    drivers = [threading.Thread(target=drive, args=(seed,)) for seed in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert not failures


@pytest.mark.parametrize("gap", [0, 0.05], ids=["spinning", "asleep"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_close_returns_whatever_the_threads_do(gap: float, used: bool) -> None:
    for n_threads in (1, 2, 4):
        pool = Pool(n_threads, 64, current_isa(), MAX_OPS)
        threads = list(pool._threads)
        chains = Chains(np.random.RandomState(0))
        if used:
            pool.run(chains.program)
        time.sleep(gap)
        close_in_time(pool)
        assert not any(thread.is_alive() for thread in threads)
        close_in_time(pool)


def test_sleeping_threads_use_no_cpu() -> None:
    """A second of idling costs next to nothing: the workers wait in the kernel, they do not spin."""
    chains = Chains(np.random.RandomState(0))
    with opened(3) as pool:
        pool.run(chains.program)
        time.sleep(0.3)  # they spin for less than that
        before = os.times()
        time.sleep(1)
        after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.5


ABANDONED = """
    import gc
    import numpy as np
    from pyinfer.kernels_cpu.isa import current_isa
    from pyinfer.kernels_cpu.opcode import OP_WORDS, STEP_WORDS
    from pyinfer.kernels_cpu.pool import Pool, Program

    nothing = Program(np.zeros((1, OP_WORDS), np.int64), np.ones(STEP_WORDS, np.int64))
    nothing.ops[0, 3] = 1  # a barrier
    for _ in range(20):
        pool = Pool(3, 64, current_isa(), 4)
        pool.run(nothing)
        threads = pool._threads
        del pool
        gc.collect()
        junk = [np.full(n, 7, np.int64) for n in range(10, 3000, 10)]  # takes the memory that the pool left
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    last = Pool(3, 64, current_isa(), 4)
    last.run(nothing)
    print("done")
"""


def test_a_pool_that_nobody_closed() -> None:
    """Its threads go when it does, and at the end of the process."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ABANDONED)], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


def bench(pool: Pool, thread: int, until: int) -> None:
    """Make a thread sit out until this time, as the pool does with one that was pushed off its core."""
    at = pool._at + THREADS + thread * RECORD + BENCHED_UNTIL
    ctypes.c_int64.from_address(at).value = until


@pytest.mark.parametrize("sitting_out", [(1,), (3,), (1, 2), (1, 2, 3)], ids=str)
def test_threads_may_sit_out_and_come_back(sitting_out: tuple[int, ...]) -> None:
    rng = np.random.RandomState(0)
    with opened(4) as pool:
        for until in (1 << 62, 0, 1 << 62):
            for thread in sitting_out:
                bench(pool, thread, until)
            for _ in range(20):
                chains = Chains(rng)
                pool.run(chains.program)
                chains.check()


def test_all_threads_take_part() -> None:
    """With long tasks, no thread of the pool stays idle."""
    seen: list[int] = []
    kernel = compiler(current_isa().name).kernel(f"test_scratch_{_VERSION}", _record_scratch)
    target = np.zeros(64, np.int64)
    ops = np.zeros((1, OP_WORDS), np.int64)
    ops[0, OpField.KERNEL], ops[0, OpField.TASKS], ops[0, OpField.BARRIER] = kernel, len(target), 1
    ops[0, MixArg.TARGET] = target.ctypes.data
    step = np.zeros(STEP_WORDS, np.int64)
    step[StepField.ONE] = 1
    with opened(2) as pool:
        for _ in range(200):  # on a loaded machine one of them may come late to a step
            pool.run(Program(ops, step))
            seen = sorted(set(target.tolist()))
            if len(seen) == 2:
                break
        scratches = sorted(scratch.ctypes.data for scratch in pool._scratch)
    assert seen == scratches


def _record_scratch(e: Any, op: Any, step: Any, first: Any, last: Any, scratch: Any) -> None:
    """target[t] = where the scratch of the thread that ran task t is, after a while."""
    target = e.ptr(e.field(op, MixArg.TARGET))
    with e.loop(last, first) as t:
        at = e.at(target, e.mul(t, 8))
        with e.loop(20_000) as i:
            e.store(i, at, 8)
            e.b.fence("seq_cst")
        e.store(e.b.ptrtoint(scratch, i64), at, 8)
