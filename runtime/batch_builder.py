"""`BatchBuilder`: turns the scheduler's plan into the arrays of a `Batch`.

All arrays are allocated once; a batch holds views that are valid until the next one is built. Each running sequence has
a row (its slot) in one page table, where only newly taken pages are written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyinfer.graph.batch import Batch, Int32
from pyinfer.runtime.request import Sequence
from pyinfer.runtime.scheduler import Plan


@dataclass(slots=True)
class Step:
    """A batch and whose logits its output rows are."""

    batch: Batch
    sampled: list[Sequence] = field(default_factory=list)
    sampled_rows: list[int] = field(default_factory=list)  # row of the logits for each of them
    searched: list[tuple[Sequence, int]] = field(default_factory=list)  # beams and their rows, not among the sampled
    # sequence, its first scored position, first row of the logits, number of rows
    scored: list[tuple[Sequence, int, int, int]] = field(default_factory=list)


class BatchBuilder:
    def __init__(self, *, block_size: int, max_tokens: int, max_sequences: int, n_ctx: int) -> None:
        self._block_size = block_size
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int32)
        self._output_rows = np.zeros(max_tokens, np.int32)
        self._starts = np.zeros(max_sequences + 1, np.int32)
        self._table = np.zeros((max_sequences, -(-n_ctx // block_size)), np.int32)
        # the very list whose first pages a row holds: the scheduler makes a new one at each admission
        self._row_pages: list[list[int]] = [[] for _ in range(max_sequences)]
        self._n_written = [0] * max_sequences
        self._count_up = np.arange(max(n_ctx, max_tokens, max_sequences) + 1, dtype=np.int32)

    def build(self, plan: Plan) -> Step:
        """The arrays of one step; `plan` holds at least one sequence."""
        self._write_pages(plan.sequences)
        n_decodes = 0
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            if count != 1 or sequence.n_scored < sequence.n_score_rows:
                break
            n_decodes += 1
        if n_decodes == len(plan.counts) and all(s.n_computed + 1 == len(s.tokens) for s in plan.sequences):
            return self._decodes(plan.sequences)
        return self._mixed(plan)

    def _write_pages(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            slot, pages = sequence.slot, sequence.pages
            if self._row_pages[slot] is not pages:
                self._row_pages[slot] = pages
                self._n_written[slot] = 0
            done = self._n_written[slot]
            if done < len(pages):
                self._table[slot, done : len(pages)] = pages[done:]
                self._n_written[slot] = len(pages)

    def _page_tables(self, sequences: list[Sequence]) -> Int32:
        """[n_sequences, most pages of any], zero past each one's end."""
        widths = [len(sequence.pages) for sequence in sequences]
        tables = self._table[[sequence.slot for sequence in sequences], : max(widths)]
        if min(widths) < tables.shape[1]:
            tables[self._count_up[: tables.shape[1]] >= np.array(widths, np.int32)[:, None]] = 0
        return tables

    def _decodes(self, sequences: list[Sequence]) -> Step:
        """The common step, every sequence advances by its one new token: no loop over tokens."""
        n, block_size = len(sequences), self._block_size
        positions = [sequence.n_computed for sequence in sequences]
        self._token_ids[:n] = [sequence.tokens[-1] for sequence in sequences]
        self._positions[:n] = positions
        self._slots[:n] = [
            sequence.pages[position // block_size] * block_size + position % block_size
            for sequence, position in zip(sequences, positions, strict=True)
        ]
        batch = Batch(
            token_ids=self._token_ids[:n],
            positions=self._positions[:n],
            slots=self._slots[None, :n],
            sequence_starts=self._count_up[: n + 1],
            page_tables=self._page_tables(sequences)[None],
            output_rows=self._count_up[:n],
        )
        return _step(batch, sequences, list(range(n)))

    def _mixed(self, plan: Plan) -> Step:
        block_size = self._block_size
        sampled: list[Sequence] = []
        sampled_rows: list[int] = []
        scored: list[tuple[Sequence, int, int, int]] = []
        start = n_rows = 0
        for i, (sequence, count) in enumerate(zip(plan.sequences, plan.counts, strict=True)):
            first = sequence.n_computed
            end = start + count
            self._starts[i + 1] = end
            self._token_ids[start:end] = sequence.tokens[first : first + count]
            positions = self._count_up[first : first + count]
            self._positions[start:end] = positions
            page, offset = np.divmod(positions, block_size)
            self._slots[start:end] = self._table[sequence.slot, page] * block_size + offset
            first_scored = max(first, sequence.n_scored)
            n_scored = min(first + count, sequence.n_score_rows) - first_scored
            if n_scored > 0:
                row = start + first_scored - first
                self._output_rows[n_rows : n_rows + n_scored] = self._count_up[row : row + n_scored]
                scored.append((sequence, first_scored, n_rows, n_scored))
                n_rows += n_scored
            if sequence.wants_next and first + count == len(sequence.tokens):
                self._output_rows[n_rows] = end - 1
                sampled.append(sequence)
                sampled_rows.append(n_rows)
                n_rows += 1
            start = end
        batch = Batch(
            token_ids=self._token_ids[:start],
            positions=self._positions[:start],
            slots=self._slots[None, :start],
            sequence_starts=self._starts[: len(plan.counts) + 1],
            page_tables=self._page_tables(plan.sequences)[None],
            output_rows=self._output_rows[:n_rows],
        )
        step = _step(batch, sampled, sampled_rows)
        step.scored = scored
        return step


def _step(batch: Batch, sequences: list[Sequence], rows: list[int]) -> Step:
    """Beams are told apart; they are rare."""
    if all(sequence.sampler is not None for sequence in sequences):
        return Step(batch, list(sequences), rows)
    pairs = list(zip(sequences, rows, strict=True))
    sampled = [(sequence, row) for sequence, row in pairs if sequence.sampler is not None]
    searched = [(sequence, row) for sequence, row in pairs if sequence.sampler is None]
    return Step(batch, [sequence for sequence, _ in sampled], [row for _, row in sampled], searched)
