"""What `attention` and `attention_merge` are told, and the numbers they share."""

from __future__ import annotations

from enum import IntEnum

from pyinfer.kernels_cpu.opcode import OpField

PARTITION = 256  # positions
MASKED = -1e30


class AttentionArg(IntEnum):
    """Operands of `attention` and `attention_merge`.

    An attention task is, counted from the fastest: a span, a row part (N_PARTS), a KV head, a token tile.
    """

    Q = OpField.ARGS
    Q_STRIDE = OpField.ARGS + 1
    OUT = OpField.ARGS + 2
    OUT_STRIDE = OpField.ARGS + 3
    K_PAGES = OpField.ARGS + 4
    V_PAGES = OpField.ARGS + 5
    BLOCK_SIZE = OpField.ARGS + 6
    N_KV_HEADS = OpField.ARGS + 7
    GROUP = OpField.ARGS + 8  # query heads for each KV head
    WINDOW = OpField.ARGS + 9  # positions; a huge number when there is none
    SCALE = OpField.ARGS + 10  # float32 bits
    N_PARTS = OpField.ARGS + 11
    PAGE_SHIFT = OpField.ARGS + 12  # log2 of the blocks of 16 positions in a page
    PARTIALS = OpField.ARGS + 13  # float32 [tokens][heads][MAX_PARTITIONS][head_dim + 2]
    MAX_PARTITIONS = OpField.ARGS + 14
    TABLES_AT = OpField.ARGS + 15  # bytes from the step's page tables to those of the layer's KV group
