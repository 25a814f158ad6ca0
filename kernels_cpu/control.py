"""The words in shared memory through which a pool's threads meet; `walker` is the code that reads and writes them."""

from __future__ import annotations

LINE = 128  # bytes between control words: a cache line and its neighbour
# Control words. ARRIVED and PHASE are the barrier, LATE says that somebody waited long at it, ACTIVE counts the step's threads.
ARRIVED, PHASE, LATE, ACTIVE, PROGRAM, N_OPS, STEP, STOP, JOB, THREADS = (i * LINE for i in range(10))
# Words of one thread's record, which start at THREADS + thread * RECORD; the ops' task counters follow the last record.
MAILBOX, ASLEEP, BENCHED_UNTIL, STRIKES, FIRST_STRIKE, LOST_SEEN = (i * LINE for i in range(6))
RECORD = 6 * LINE
