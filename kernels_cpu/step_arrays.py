"""What changes from step to step, where a stage's kernels find it: the step's header and the arrays that it points to."""

from __future__ import annotations

import numpy as np

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch, Int32
from pyinfer.kernels_cpu.memory import address
from pyinfer.kernels_cpu.opcode import STEP_WORDS, StepField

_TILE_TOKENS = 8  # query tokens of one attention task


class StepArrays:
    """Filled by `load` once a step, however many stages read them."""

    def __init__(self, config: StageConfig, n_groups: int) -> None:
        n = config.max_tokens
        self.header = np.zeros(STEP_WORDS, np.int64)
        self.n_tiles = 0  # attention tasks of the step
        self._token_ids, self._positions, self._output_rows = (np.zeros(n, np.int32) for _ in range(3))
        self._slots = np.zeros((n_groups, n), np.int32)
        self._page_tables = np.zeros((n_groups, config.max_sequences, config.max_blocks), np.int32)
        self._tiles = np.zeros((n, 4), np.int32)
        self._loaded: Int32 | None = None  # the ids of the step that is in the arrays
        header = self.header
        header[StepField.ONE] = 1
        header[StepField.TOKEN_IDS] = address(self._token_ids)
        header[StepField.POSITIONS] = address(self._positions)
        header[StepField.SLOTS] = address(self._slots)
        header[StepField.OUTPUT_ROWS] = address(self._output_rows)
        header[StepField.PAGE_TABLES] = address(self._page_tables)
        header[StepField.PAGE_TABLE_STRIDE] = 4 * config.max_blocks
        header[StepField.ATTENTION_TILES] = address(self._tiles)

    def load(self, batch: Batch, *, once: bool) -> None:
        """Copy a batch. `once`: not if it was the last one already, for stages that run the same batch one after another."""
        if once and batch.token_ids is self._loaded:
            return
        self._loaded = batch.token_ids
        n, n_outputs = batch.n_tokens, len(batch.output_rows)
        self._token_ids[:n], self._positions[:n], self._slots[:, :n] = batch.token_ids, batch.positions, batch.slots
        self._output_rows[:n_outputs] = batch.output_rows
        tables = batch.page_tables
        self._page_tables[:, : tables.shape[1], : tables.shape[2]] = tables
        self.header[StepField.N_TOKENS], self.header[StepField.N_OUTPUTS] = n, n_outputs
        self.n_tiles = self._cut_tiles(batch)

    def _cut_tiles(self, batch: Batch) -> int:
        """Fill the attention tiles: (sequence, first token, tokens); returns how many."""
        starts = batch.sequence_starts
        if len(starts) == batch.n_tokens + 1:  # decode: every sequence has one token
            tiles = self._tiles[: batch.n_tokens]
            tiles[:, 0] = tiles[:, 1] = np.arange(batch.n_tokens)
            tiles[:, 2] = 1
            return batch.n_tokens
        count = 0
        for sequence in range(batch.n_sequences):
            start, end = int(starts[sequence]), int(starts[sequence + 1])
            for token in range(start, end, _TILE_TOKENS):
                self._tiles[count, :3] = sequence, token, min(_TILE_TOKENS, end - token)
                count += 1
        return count
