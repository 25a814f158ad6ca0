"""The records a program is made of: int64 words that Python fills in and kernels read.

Every kernel is `void kernel(op, step, first, last, scratch)`: the addresses of its op record and of the step header, the range
of tasks to do, and the calling thread's scratch memory.
"""

from __future__ import annotations

from enum import IntEnum

OP_WORDS = 24


class OpField(IntEnum):
    """The words that the walker reads; a kernel's own operands start at ARGS."""

    KERNEL = 0  # address of the kernel
    TASKS = 1  # tasks = TASKS * step[TASKS_PER]
    TASKS_PER = 2  # a StepField
    BARRIER = 3  # 1: every thread finishes this op before the next one starts
    ARGS = 4


class StepField(IntEnum):
    """The words that change with every step."""

    ONE = 0  # always 1
    N_TOKENS = 1
    N_OUTPUTS = 2
    N_ATTENTION = 3  # row tiles over all sequences
    TOKEN_IDS = 4  # addresses of the batch's arrays
    POSITIONS = 5
    SLOTS = 6
    OUTPUT_ROWS = 7
    PAGE_TABLES = 8
    PAGE_TABLE_STRIDE = 9  # bytes
    ATTENTION_TILES = 10  # int32 [N_ATTENTION, 4]: sequence, first token, number of tokens, unused


STEP_WORDS = 16
