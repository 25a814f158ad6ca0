"""Batches by hand: sequences on pages of one's choice, and a prompt pushed through a stage in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import Stage
from pyinfer.graph.batch import Batch


@dataclass(frozen=True)
class Piece:
    """The next tokens of one sequence, at positions from `start`; `pages` hold the sequence from position 0."""

    ids: Sequence[int]
    pages: Sequence[int]
    start: int = 0


def make_batch(pieces: Sequence[Piece], block_size: int, outputs: Sequence[int] | None = None) -> Batch:
    """One step over the pieces; logits of the tokens `outputs` (default: of all)."""
    positions = np.concatenate([np.arange(p.start, p.start + len(p.ids)) for p in pieces])
    slots = [
        p.pages[i // block_size] * block_size + i % block_size
        for p in pieces
        for i in range(p.start, p.start + len(p.ids))
    ]
    tables = np.zeros((len(pieces), max(len(p.pages) for p in pieces)), np.int32)
    for row, piece in zip(tables, pieces, strict=True):
        row[: len(piece.pages)] = piece.pages
    rows = range(len(positions)) if outputs is None else outputs
    return Batch(
        token_ids=np.concatenate([np.asarray(p.ids, np.int32) for p in pieces]),
        positions=positions.astype(np.int32),
        slots=np.asarray(slots, np.int32),
        sequence_starts=np.cumsum([0, *(len(p.ids) for p in pieces)], dtype=np.int32),
        page_tables=tables,
        output_rows=np.asarray(rows, np.int32).reshape(-1),
    )


def run_prompt(
    stage: Stage, ids: Sequence[int], pages: Sequence[int], block_size: int, chunk: int | None = None
) -> npt.NDArray[np.float32]:
    """Logits [len(ids), n_vocab] of a prompt from position 0, at most `chunk` tokens a step."""
    step = chunk or len(ids)
    parts = [
        stage.run(make_batch([Piece(ids[i : i + step], pages, i)], block_size)).copy() for i in range(0, len(ids), step)
    ]
    return np.concatenate(parts)
