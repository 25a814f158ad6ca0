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
    BARRIER = 3  # 1: every op before this one is finished before it starts (unless it has no tasks)
    ARGS = 4


class StepField(IntEnum):
    """The words that change with every step."""

    ONE = 0  # always 1
    N_TOKENS = 1
    N_OUTPUTS = 2
    N_ATTENTION = 3  # row tiles over all sequences, times the spans
    TOKEN_IDS = 4  # addresses of the batch's arrays
    POSITIONS = 5
    SLOTS = 6  # [n_groups, max_tokens]
    OUTPUT_ROWS = 7
    PAGE_TABLES = 8  # [n_groups, max_sequences, pages]
    PAGE_TABLE_STRIDE = 9  # bytes of a sequence
    ATTENTION_TILES = 10  # int32 [N_ATTENTION / N_SPANS, 4]: sequence, first token, number of tokens, unused
    N_SPANS = 11  # parts that each sequence's partitions are cut into; 1: attention writes its result itself
    N_MERGED = 12  # tokens whose spans are to be merged: N_TOKENS with several spans, else 0


STEP_WORDS = 16
