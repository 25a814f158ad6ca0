"""Sizes that programs are lowered for: a step of n rows runs the program of the next bucket, with padding."""

from __future__ import annotations

from bisect import bisect_left

DECODE_ROWS = 8  # up to here matmuls read int8 rows, one token a column; above, tensor cores
_SMALL = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


def token_buckets(max_tokens: int) -> tuple[int, ...]:
    """Ascending, the last is `max_tokens`: padding costs at most half more, and 256 rows at a time in prompts."""
    sizes = [*_SMALL, *range(512, max_tokens, 256)]
    return (*(size for size in sizes if size < max_tokens), max_tokens)


def output_buckets(n_tokens: int) -> tuple[int, ...]:
    """Ascending: how many rows of a step of `n_tokens` may go through the head. 0: a prompt's chunk that is not its last.

    Few, as each is a program: in decode all tokens are outputs, and of prompts one a sequence.
    """
    return (*(size for size in (0, 1, DECODE_ROWS, 32, 128, 256) if size < n_tokens), n_tokens)


def bucket_of(n: int, buckets: tuple[int, ...]) -> int:
    """The smallest that holds n."""
    return buckets[bisect_left(buckets, n)]


def sequence_buckets(max_sequences: int) -> tuple[int, ...]:
    """Ascending: how many sequences a prompt's attention leaves room for."""
    return (*(size for size in (1, 8, 64) if size < max_sequences), max_sequences)
