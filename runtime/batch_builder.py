"""`BatchBuilder`: turns the scheduler's plan into the arrays of a `Batch`.

All arrays are allocated once; a batch holds views that are valid until the next one is built. Each running sequence has
a row (its slot) in the page table of each KV group, where only newly taken pages are written. A token that a step in
flight will give is named by its row there (`PREVIOUS`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyinfer.graph.batch import Batch, Int32
from pyinfer.graph.sampling import PREVIOUS
from pyinfer.runtime.page_layout import PageLayout
from pyinfer.runtime.pages import PagePool
from pyinfer.runtime.plan import Plan
from pyinfer.runtime.request import Sequence


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
    def __init__(self, layout: PageLayout, pool: PagePool, *, max_sequences: int, n_ctx: int) -> None:
        block_size, max_tokens, n_groups = layout.block_size, layout.max_tokens, layout.n_groups
        self._block_size = block_size
        self._layout, self._pool = layout, pool
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros((n_groups, max_tokens), np.int32)
        self._output_rows = np.zeros(max_tokens, np.int32)
        self._starts = np.zeros(max_sequences + 1, np.int32)
        self._table = np.zeros((n_groups, max_sequences, -(-n_ctx // block_size)), np.int32)
        # the very lists whose first blocks a row holds: the scheduler makes new ones at each admission
        self._row_tables: list[list[list[int]]] = [[] for _ in range(max_sequences)]
        self._n_written = [[0] * len(layout.kinds) for _ in range(max_sequences)]
        self._count_up = np.arange(max(n_ctx, max_tokens, max_sequences) + 1, dtype=np.int32)

    def build(self, plan: Plan, n_ahead: int = 0) -> Step:
        """The arrays of one step; `plan` holds at least one sequence. Tables reach `n_ahead` tokens further if all decode."""
        self._write_pages(plan.sequences)
        n_decodes = 0
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            if count != 1 or sequence.n_scored < sequence.n_score_rows:
                break
            n_decodes += 1
        if n_decodes == len(plan.counts) and all(s.n_computed + 1 == s.n_tokens for s in plan.sequences):
            return self._decodes(plan.sequences, n_ahead)
        return self._mixed(plan)

    def _write_pages(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            slot, tables = sequence.slot, sequence.tables
            written = self._n_written[slot]
            if self._row_tables[slot] is not tables:
                self._row_tables[slot] = tables
                written[:] = sequence.firsts  # what is behind a window is not read
            for kind, table in enumerate(tables):
                if written[kind] < len(table):
                    self._write_row(slot, kind, table, written[kind])
                    written[kind] = len(table)

    def _write_row(self, slot: int, kind: int, table: list[int], start: int) -> None:
        groups, blocks = self._layout.kinds[kind].groups, table[start:]
        if len(groups) == 1:
            self._table[groups[0], slot, start : len(table)] = blocks
        else:
            pages = [self._pool.pages_of(block) for block in blocks]
            self._table[groups, slot, start : len(table)] = np.array(pages, np.int32).T

    def _page_tables(self, slots: list[int], ends: Int32) -> Int32:
        """[n_groups, n_sequences, most blocks of any], zero past each one's end, which is in tokens."""
        widths = (ends + (self._block_size - 1)) // self._block_size
        width = int(widths.max())
        tables = self._table[:, slots, :width]
        if int(widths.min()) < width:
            tables[:, self._count_up[:width] >= widths[:, None]] = 0
        return tables

    def _decodes(self, sequences: list[Sequence], n_ahead: int) -> Step:
        """The common step, every sequence advances by its one new token: no loop over tokens."""
        n, block_size = len(sequences), self._block_size
        slots = [sequence.slot for sequence in sequences]
        positions = self._positions[:n]
        positions[:] = [sequence.n_computed for sequence in sequences]
        self._token_ids[:n] = [
            PREVIOUS - sequence.coming_row if sequence.n_coming else sequence.tokens[-1] for sequence in sequences
        ]
        block, offset = np.divmod(positions, block_size)
        self._slots[:, :n] = self._table[:, slots, block] * block_size + offset
        batch = Batch(
            token_ids=self._token_ids[:n],
            positions=self._positions[:n],
            slots=self._slots[:, :n],
            sequence_starts=self._count_up[: n + 1],
            page_tables=self._page_tables(slots, positions + (1 + n_ahead)),
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
            known = sequence.tokens[first : first + count]
            self._token_ids[start : start + len(known)] = known
            self._token_ids[start + len(known) : end] = PREVIOUS - sequence.coming_row  # one at most
            positions = self._count_up[first : first + count]
            self._positions[start:end] = positions
            block, offset = np.divmod(positions, block_size)
            self._slots[:, start:end] = self._table[:, sequence.slot, block] * block_size + offset
            first_scored = max(first, sequence.n_scored)
            n_scored = min(first + count, sequence.n_score_rows) - first_scored
            if n_scored > 0:
                row = start + first_scored - first
                self._output_rows[n_rows : n_rows + n_scored] = self._count_up[row : row + n_scored]
                scored.append((sequence, first_scored, n_rows, n_scored))
                n_rows += n_scored
            if sequence.wants_next and first + count == sequence.n_tokens:
                self._output_rows[n_rows] = end - 1
                sampled.append(sequence)
                sampled_rows.append(n_rows)
                n_rows += 1
            start = end
        starts = self._starts[: len(plan.counts) + 1]
        batch = Batch(
            token_ids=self._token_ids[:start],
            positions=self._positions[:start],
            slots=self._slots[:, :start],
            sequence_starts=starts,
            page_tables=self._page_tables([s.slot for s in plan.sequences], self._positions[starts[1:] - 1] + 1),
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
