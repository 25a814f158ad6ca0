"""A batch in parts, for steps that ask for more output rows than a program computes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyinfer.graph.batch import Batch


def split_batch(batch: Batch, max_outputs: int) -> Iterator[Batch]:
    """Runs of tokens, in order, with at most so many outputs each: a sequence's later tokens read the pages of those before."""
    ends = [*(batch.output_rows[max_outputs::max_outputs].tolist()), batch.n_tokens]
    start = 0
    for end in ends:
        yield _part(batch, start, end)
        start = end


def _part(batch: Batch, start: int, end: int) -> Batch:
    """The tokens from `start` to before `end`."""
    starts = batch.sequence_starts
    first = int(np.searchsorted(starts, start, side="right")) - 1
    last = int(np.searchsorted(starts, end, side="left"))
    outputs = (batch.output_rows >= start) & (batch.output_rows < end)
    return Batch(
        token_ids=batch.token_ids[start:end],
        positions=batch.positions[start:end],
        slots=batch.slots[:, start:end],
        sequence_starts=np.clip(starts[first : last + 1], start, end).astype(np.int32) - np.int32(start),
        page_tables=batch.page_tables[:, first:last],
        output_rows=batch.output_rows[outputs] - np.int32(start),
        hidden=tuple(rows[start:end] if len(rows) == batch.n_tokens else rows[outputs] for rows in batch.hidden),
    )
