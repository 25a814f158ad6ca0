"""The loop every thread of the pool runs: walk a program's ops, take tasks, meet at barriers. No Python inside.

Control words (int64, each on its own cache line pair): see `Control`. This module is imported only by `pool`, after the
compile cache's place is set.
"""

from __future__ import annotations

from numba import njit

from pyinfer.kernels_cpu.machine import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_kernel,
    load_word,
    pause,
    wait_on,
    wake_all,
    yield_core,
)
from pyinfer.kernels_cpu.opcode import OP_WORDS, OpField

LINE = 128  # bytes between control words
ARRIVED, PHASE, JOB, SLEEPERS, PROGRAM, N_OPS, STEP, STOP, COUNTERS = (i * LINE for i in range(9))
_OP_BYTES = 8 * OP_WORDS
_TASKS, _TASKS_PER, _BARRIER, _KERNEL = (
    8 * int(f) for f in (OpField.TASKS, OpField.TASKS_PER, OpField.BARRIER, OpField.KERNEL)
)
_SPIN_BEFORE_SLEEP = 20_000  # pauses, about 0.2 to 0.4 ms: the gap between two decode steps
_SPIN_BEFORE_YIELD = 20_000  # in a barrier: somebody was descheduled, give the core away,
_SPIN_BETWEEN_YIELDS = 500  # and keep giving it away
_SHARES = 8  # tasks of an op are taken in about this many pieces a thread


@njit(nogil=True, cache=True)
def _barrier(control, n_threads, first_op, last_op):  # type: ignore[no-untyped-def]
    phase = atomic_load(control + PHASE)
    if atomic_add(control + ARRIVED, 1) == n_threads - 1:
        for i in range(first_op, last_op + 1):
            atomic_store(control + COUNTERS + i * LINE, 0)
        atomic_store(control + ARRIVED, 0)
        atomic_store(control + PHASE, phase + 1)
        return
    spins = 0
    while atomic_load(control + PHASE) == phase:
        pause()
        spins += 1
        if spins > _SPIN_BEFORE_YIELD:
            yield_core()
            spins = _SPIN_BEFORE_YIELD - _SPIN_BETWEEN_YIELDS


@njit(nogil=True, cache=True)
def walk(control, n_threads, scratch):  # type: ignore[no-untyped-def]
    """Run the posted program once, as one of `n_threads`."""
    program, step = load_word(control + PROGRAM), load_word(control + STEP)
    n_ops = load_word(control + N_OPS)
    since = 0
    for i in range(n_ops):
        op = program + i * _OP_BYTES
        n_tasks = load_word(op + _TASKS) * load_word(step + 8 * load_word(op + _TASKS_PER))
        kernel = load_word(op + _KERNEL)
        if n_threads == 1:
            if n_tasks > 0:
                call_kernel(kernel, op, step, 0, n_tasks, scratch)
            continue
        piece = max(1, n_tasks // (n_threads * _SHARES))
        counter = control + COUNTERS + i * LINE
        while True:
            start = atomic_add(counter, piece)
            if start >= n_tasks:
                break
            call_kernel(kernel, op, step, start, min(start + piece, n_tasks), scratch)
        if load_word(op + _BARRIER) != 0:
            _barrier(control, n_threads, since, i)
            since = i + 1


@njit(nogil=True, cache=True)
def work(control, n_threads, scratch):  # type: ignore[no-untyped-def]
    """A pool thread's life: wait for the next job, walk it, until told to stop."""
    seen = 0
    while True:
        spins = 0
        while atomic_load(control + JOB) == seen:
            spins += 1
            if spins < _SPIN_BEFORE_SLEEP:
                pause()
            else:
                atomic_add(control + SLEEPERS, 1)
                wait_on(control + JOB, seen & 0x7FFFFFFF)
                atomic_add(control + SLEEPERS, -1)
        seen = atomic_load(control + JOB)
        if atomic_load(control + STOP) != 0:
            return
        walk(control, n_threads, scratch)


@njit(nogil=True, cache=True)
def submit(control, program, n_ops, step, n_threads, scratch):  # type: ignore[no-untyped-def]
    """Post a program and walk it as thread 0; returns when every op is done."""
    atomic_store(control + PROGRAM, program)
    atomic_store(control + N_OPS, n_ops)
    atomic_store(control + STEP, step)
    if n_threads > 1:
        atomic_add(control + JOB, 1)
        if atomic_load(control + SLEEPERS) > 0:
            wake_all(control + JOB)
    walk(control, n_threads, scratch)


@njit(nogil=True, cache=True)
def stop(control):  # type: ignore[no-untyped-def]
    """Make every pool thread return."""
    atomic_store(control + STOP, 1)
    atomic_add(control + JOB, 1)
    wake_all(control + JOB)
