"""`FakeStage` as a stage that samples: with NumPy what `graph.sampling` asks for, one step at a time, several, or overlapping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from fake_stage import ONE_GROUP, FakeStage

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch, Int32
from pyinfer.graph.kv_groups import KVGroup
from pyinfer.graph.sampling import NOT_FINITE, PREVIOUS, RowLogprobs, RowSampling, Sampled
from pyinfer.runtime.logprobs import token_logprobs
from pyinfer.runtime.sample_filters import draw
from pyinfer.runtime.sample_random import uniform
from pyinfer.runtime.sampling_params import SamplingParams


class SamplingFake(FakeStage):
    can_sample = True
    max_edits, max_logprobs = 1000, 5

    def __init__(self, config: StageConfig, max_steps: int = 8, *, groups: Sequence[KVGroup] = ONE_GROUP) -> None:
        super().__init__(config, groups=groups)
        self.max_steps = max_steps
        self.n_sampled = self.n_ahead = self.n_whole = 0  # steps by their kind
        self.broken_at: int | None = None  # this step's logits are NaN

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.n_whole += 1
        return self._logits(batch)

    def _logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        logits = super().run(batch)
        return np.full_like(logits, np.nan) if self.n_steps == self.broken_at else logits

    def run_sampled(self, batch: Batch, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None) -> Sampled:
        assert mask is None
        self.n_sampled += 1
        return self._sample(batch, rows)

    def run_steps(self, batch: Batch, rows: Sequence[RowSampling], n_steps: int) -> Int32:
        assert 1 < n_steps <= self.max_steps and len(rows) == batch.n_tokens == batch.n_sequences
        self.n_ahead += n_steps - 1
        steps = []
        for step in range(n_steps):
            numbers = [uniform(seed, index, position + step) for seed, index, position in (r.counter for r in rows)]
            tokens = self._sample(
                batch, [replace(row, number=number) for row, number in zip(rows, numbers, strict=True)]
            ).tokens
            steps.append(tokens)
            positions = batch.positions + 1
            page, offset = np.divmod(positions, self.config.block_size)
            if step + 1 < n_steps:
                pages = batch.page_tables[:, np.arange(len(rows)), page]
                slots = (pages * self.config.block_size + offset).astype(np.int32)
                ids = np.maximum(tokens, 0).astype(np.int32)
                batch = replace(batch, token_ids=ids, positions=positions.astype(np.int32), slots=slots)
        return np.array(steps, np.int32)

    def _sample(self, batch: Batch, rows: Sequence[RowSampling]) -> Sampled:
        logits = self._logits(batch)
        tokens, logprobs = [], []
        for each in rows:
            row = logits[each.row]
            tokens.append(self._draw(row.copy(), each))
            logprobs.append(None if each.n_logprobs is None else _logprobs(row, tokens[-1], each.n_logprobs))
        return Sampled(tokens, logprobs)

    @staticmethod
    def _draw(row: npt.NDArray[np.float32], how: RowSampling) -> int:
        if not np.isfinite(row.max()):
            return NOT_FINITE
        for token, bias, repetition, penalty in () if how.edits is None else how.edits.tolist():
            value = row[token] + np.float32(bias)
            value = value / np.float32(repetition) if value > 0 else value * np.float32(repetition)
            row[token] = value - np.float32(penalty)
        if how.temperature == 0:
            return int(row.argmax())
        params = SamplingParams(temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p)
        return draw(row, params, how.number)


class OverlappingFake(SamplingFake):
    """Gives tokens only when they are fetched, and fails there; what a failed step should have stored is not there."""

    can_overlap = True

    def __init__(self, config: StageConfig, *, groups: Sequence[KVGroup] = ONE_GROUP, n_most: int = 1000) -> None:
        super().__init__(config, groups=groups)
        self.max_edits = n_most
        self.n_started = 0
        self._tokens: list[int] = []  # of the step that was started last
        self._tickets: dict[int, Sampled | Exception] = {}

    def start_sampled(self, batch: Batch, rows: Sequence[RowSampling]) -> int:
        assert len(self._tickets) < 2
        self.n_started += 1
        ids = [self._tokens[PREVIOUS - i] if i <= PREVIOUS else i for i in batch.token_ids.tolist()]
        batch = replace(batch, token_ids=np.maximum(ids, 0).astype(np.int32))
        result: Sampled | Exception
        try:
            result = self._sample(batch, rows)
            self._tokens = result.tokens
        except RuntimeError as error:
            result, self._tokens = error, [0] * len(rows)
        self._tickets[self.n_started] = result
        return self.n_started

    def fetch_sampled(self, ticket: int) -> Sampled:
        result = self._tickets.pop(ticket)
        if isinstance(result, Exception):
            raise result
        return result


def _logprobs(row: npt.NDArray[np.float32], token: int, n: int) -> RowLogprobs:
    top = np.argsort(-row, kind="stable")[:n]
    entry = token_logprobs(row, token, 0)[token]
    logit = float(row[token])
    return RowLogprobs(logit, entry.rank, logit - entry.logprob, top.tolist(), row[top].tolist())
