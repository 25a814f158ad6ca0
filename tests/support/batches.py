"""Batches by hand: sequences on pages of one's choice, and a prompt pushed through a stage in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import Stage
from pyinfer.graph.batch import Batch
from pyinfer.graph.graph import Graph
from pyinfer.graph.kv_groups import one_group


def one_table(graph: Graph) -> Graph:
    """All layers in one KV group, so that a page number is enough to say where keys and values go."""
    return replace(graph, kv_groups=one_group(graph.kv_layers))


@dataclass(frozen=True)
class Piece:
    """The next tokens of one sequence, at positions from `start`; `pages` hold the sequence from position 0.

    With several KV groups `pages` has a list for each.
    """

    ids: Sequence[int]
    pages: Sequence[int] | Sequence[Sequence[int]]
    start: int = 0


def make_batch(pieces: Sequence[Piece], block_size: int, outputs: Sequence[int] | None = None) -> Batch:
    """One step over the pieces; logits of the tokens `outputs` (default: of all)."""
    positions = np.concatenate([np.arange(p.start, p.start + len(p.ids)) for p in pieces])
    pages = [np.atleast_2d(np.asarray(p.pages, np.int32)) for p in pieces]  # each [n_groups, pages]
    tables = np.zeros((len(pages[0]), len(pieces), max(p.shape[1] for p in pages)), np.int32)
    for s, table in enumerate(pages):
        tables[:, s, : table.shape[1]] = table
    owners = np.repeat(np.arange(len(pieces)), [len(p.ids) for p in pieces])
    slots = tables[:, owners, positions // block_size] * block_size + positions % block_size
    rows = range(len(positions)) if outputs is None else outputs
    return Batch(
        token_ids=np.concatenate([np.asarray(p.ids, np.int32) for p in pieces]),
        positions=positions.astype(np.int32),
        slots=slots.astype(np.int32),
        sequence_starts=np.cumsum([0, *(len(p.ids) for p in pieces)], dtype=np.int32),
        page_tables=tables,
        output_rows=np.asarray(rows, np.int32).reshape(-1),
    )


def run_prompt(
    stage: Stage,
    ids: Sequence[int],
    pages: Sequence[int] | Sequence[Sequence[int]],
    block_size: int,
    chunk: int | None = None,
) -> npt.NDArray[np.float32]:
    """Logits [len(ids), n_vocab] of a prompt from position 0, at most `chunk` tokens a step."""
    step = chunk or len(ids)
    parts = [
        stage.run(make_batch([Piece(ids[i : i + step], pages, i)], block_size)).copy() for i in range(0, len(ids), step)
    ]
    return np.concatenate(parts)
