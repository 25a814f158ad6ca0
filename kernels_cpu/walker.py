"""The loop every thread of the pool runs: walk a program's ops, take tasks, meet at barriers. No Python inside.

Threads are told to work through a mailbox each, so a step can leave some out. A thread that another process pushed off its
core again and again while the others waited at a barrier sits out the steps of the next second: a busy neighbour costs one
thread's share and not everybody's time. Only `numba_code` imports this module, where the machine code is not at hand.
"""

from __future__ import annotations

from numba import njit

from pyinfer.kernels_cpu.control import (
    ACTIVE,
    ARRIVED,
    ASLEEP,
    BENCHED_UNTIL,
    FIRST_STRIKE,
    JOB,
    LATE,
    LINE,
    LOST_SEEN,
    MAILBOX,
    N_OPS,
    PHASE,
    PROGRAM,
    RECORD,
    STEP,
    STOP,
    STRIKES,
    THREADS,
)
from pyinfer.kernels_cpu.machine import (
    MONOTONIC,
    THREAD_TIME,
    atomic_add,
    atomic_load,
    atomic_store,
    call_kernel,
    clock,
    load_word,
    pause,
    wait_on,
    wake,
    yield_core,
)
from pyinfer.kernels_cpu.opcode import OP_WORDS, OpField, StepField

_OP_BYTES = 8 * OP_WORDS
_TASKS, _TASKS_PER, _BARRIER, _KERNEL = (
    8 * int(f) for f in (OpField.TASKS, OpField.TASKS_PER, OpField.BARRIER, OpField.KERNEL)
)
_N_TOKENS = 8 * int(StepField.N_TOKENS)
_SPIN_BEFORE_SLEEP = 20_000  # pauses, some tenths of a millisecond: the gap between two decode steps
_SPIN_BEFORE_LOOK = 2_000  # pauses in a barrier before the clock is read
_SPIN_BETWEEN_LOOKS = 200
_LATE = 1_000_000  # ns of waiting at a barrier after which somebody must have been pushed off a core
_LOST = 500_000  # ns that a step's last thread must have been off its core to be the one
_STRIKES = 3  # so often within _STRIKE_WINDOW ns: the system's own threads come and go, a busy neighbour stays
_STRIKE_WINDOW = 60_000_000
_BENCH = 1_000_000_000  # ns to sit out
# Tasks of an op are taken in about so many pieces a thread: few where a task is short, as in decode, more in a prompt, where
# the last piece's length is what threads wait for each other.
_FEW_SHARES, _MANY_SHARES, _MANY_TOKENS = 8, 32, 32
compiled = njit(error_model="numpy")  # no exceptions, as `numba_code` asks for


@compiled
def _was_late(control, thread, n_all, lost):  # type: ignore[no-untyped-def]
    """`thread` came last and others waited long: if it was off its core, that is a strike; too many, and one sits out.

    Thread 0 is the caller and cannot leave: the last active one makes room for it.
    """
    record = control + THREADS + thread * RECORD
    now = clock(MONOTONIC)
    lost_now = now - clock(THREAD_TIME)
    if lost_now - max(lost, load_word(record + LOST_SEEN)) <= _LOST:
        return
    atomic_store(record + LOST_SEEN, lost_now)
    strikes = load_word(record + STRIKES) + 1
    if now - load_word(record + FIRST_STRIKE) > _STRIKE_WINDOW:
        atomic_store(record + FIRST_STRIKE, now)
        strikes = 1
    atomic_store(record + STRIKES, strikes)
    if strikes < _STRIKES:
        return
    atomic_store(record + STRIKES, 0)
    if thread == 0:
        thread = n_all - 1
        while thread > 0 and atomic_load(control + THREADS + thread * RECORD + BENCHED_UNTIL) > now:
            thread -= 1
    if thread > 0:
        atomic_store(control + THREADS + thread * RECORD + BENCHED_UNTIL, now + _BENCH)


@compiled
def _barrier(control, thread, n_active, n_all, counters, first_op, last_op, lost):  # type: ignore[no-untyped-def]
    """Wait for all; the last one clears the task counters. `lost` is this thread's time off its core before the step."""
    phase = atomic_load(control + PHASE)
    if atomic_add(control + ARRIVED, 1) == n_active - 1:
        if atomic_load(control + LATE) != 0:
            atomic_store(control + LATE, 0)
            _was_late(control, thread, n_all, lost)
        for i in range(first_op, last_op + 1):
            atomic_store(counters + i * LINE, 0)
        atomic_store(control + ARRIVED, 0)
        atomic_store(control + PHASE, phase + 1)
        return
    spins = 0
    started = 0
    while atomic_load(control + PHASE) == phase:
        pause()
        spins += 1
        if spins >= _SPIN_BEFORE_LOOK:
            spins -= _SPIN_BETWEEN_LOOKS
            now = clock(MONOTONIC)
            if started == 0:
                started = now
            elif now - started > _LATE:
                atomic_store(control + LATE, 1)
                yield_core()


@compiled
def walk(control, thread, n_all, scratch):  # type: ignore[no-untyped-def]
    """Run the posted program once."""
    program, step = load_word(control + PROGRAM), load_word(control + STEP)
    n_ops, n_active = load_word(control + N_OPS), load_word(control + ACTIVE)
    counters = control + THREADS + n_all * RECORD
    lost = clock(MONOTONIC) - clock(THREAD_TIME)
    shares = n_active * (_MANY_SHARES if load_word(step + _N_TOKENS) >= _MANY_TOKENS else _FEW_SHARES)
    since = 0
    for i in range(n_ops):
        op = program + i * _OP_BYTES
        n_tasks = load_word(op + _TASKS) * load_word(step + 8 * load_word(op + _TASKS_PER))
        kernel = load_word(op + _KERNEL)
        if n_tasks == 0:
            continue
        if n_active == 1:
            call_kernel(kernel, op, step, 0, n_tasks, scratch)
            continue
        if load_word(op + _BARRIER) != 0:
            _barrier(control, thread, n_active, n_all, counters, since, i - 1, lost)
            since = i
        piece = max(1, n_tasks // shares)
        counter = counters + i * LINE
        while True:
            start = atomic_add(counter, piece)
            if start >= n_tasks:
                break
            call_kernel(kernel, op, step, start, min(start + piece, n_tasks), scratch)
    if n_active > 1:
        _barrier(control, thread, n_active, n_all, counters, since, n_ops - 1, lost)


@compiled
def work(control, thread, n_all, scratch):  # type: ignore[no-untyped-def]
    """A pool thread's life: wait for a job in the mailbox, walk it, until told to stop."""
    record = control + THREADS + thread * RECORD
    seen = 0
    while True:
        spins = 0
        while atomic_load(record + MAILBOX) == seen:
            spins += 1
            if spins < _SPIN_BEFORE_SLEEP:
                pause()
            else:
                atomic_add(record + ASLEEP, 1)
                wait_on(record + MAILBOX, seen & 0x7FFFFFFF)
                atomic_add(record + ASLEEP, -1)
        seen = atomic_load(record + MAILBOX)
        if atomic_load(control + STOP) != 0:
            return
        walk(control, thread, n_all, scratch)


@compiled
def _call(control, thread, job):  # type: ignore[no-untyped-def]
    """Put a job into a thread's mailbox. The addition is a full fence: a sleeper is seen, or it sees the job."""
    record = control + THREADS + thread * RECORD
    atomic_add(record + MAILBOX, job - atomic_load(record + MAILBOX))
    if atomic_load(record + ASLEEP) > 0:
        wake(record + MAILBOX)


@compiled
def submit(control, program, n_ops, step, n_all, scratch):  # type: ignore[no-untyped-def]
    """Post a program and walk it as thread 0, with every thread that is not benched; returns when every op is done."""
    now = clock(MONOTONIC)
    n_active = 1
    for thread in range(1, n_all):
        if atomic_load(control + THREADS + thread * RECORD + BENCHED_UNTIL) <= now:
            n_active += 1
    atomic_store(control + PROGRAM, program)
    atomic_store(control + N_OPS, n_ops)
    atomic_store(control + STEP, step)
    atomic_store(control + ACTIVE, n_active)
    job = atomic_load(control + JOB) + 1
    atomic_store(control + JOB, job)
    if n_active > 1:
        for thread in range(1, n_all):
            if atomic_load(control + THREADS + thread * RECORD + BENCHED_UNTIL) <= now:
                _call(control, thread, job)
    walk(control, 0, n_all, scratch)


@compiled
def stop(control, n_all):  # type: ignore[no-untyped-def]
    """Make every pool thread return."""
    atomic_store(control + STOP, 1)
    job = atomic_load(control + JOB) + 1
    for thread in range(1, n_all):
        _call(control, thread, job)
