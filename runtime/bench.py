"""Measuring a stage: prompt processing (pp) and text generation (tg), as llama-bench defines them.

Batches of random token ids go straight into `Stage.run`: no scheduler, no sampler, no tokenizer. A prompt asks for the
logits of its last token only, a generated token for its own; a stage that samples gives the most likely token instead,
as it does when it serves, so that logits stay on the device. The KV cache is filled to the test's depth before the
clock starts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import Stage
from pyinfer.graph.batch import Batch, Int32
from pyinfer.graph.sampling import OverlappingStage, RowSampling, SamplingStage


@dataclass(frozen=True)
class BenchTest:
    """One measurement; either `n_prompt` or `n_gen` is 0."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0  # tokens already in the cache
    n_parallel: int = 1  # sequences that run at the same time

    @property
    def name(self) -> str:
        """'pp512', 'tg128', 'tg128 @ d4096'."""
        base = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{base} @ d{self.n_depth}" if self.n_depth else base

    @property
    def n_ctx(self) -> int:
        """Tokens that one sequence holds in the end."""
        return self.n_depth + self.n_prompt + self.n_gen

    @property
    def n_tokens(self) -> int:
        """Tokens that the clock sees, over all sequences."""
        return self.n_parallel * (self.n_prompt + self.n_gen)


@dataclass(frozen=True)
class BenchResult:
    """The samples of one test."""

    test: BenchTest
    samples_ns: tuple[int, ...]

    @property
    def samples_ts(self) -> tuple[float, ...]:
        """Tokens per second, of all sequences together."""
        return tuple(1e9 * self.test.n_tokens / ns for ns in self.samples_ns)

    @property
    def avg_ns(self) -> float:
        return statistics.fmean(self.samples_ns)

    @property
    def stddev_ns(self) -> float:
        return statistics.stdev(self.samples_ns) if len(self.samples_ns) > 1 else 0.0

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0


def make_tests(
    prompts: Sequence[int], gens: Sequence[int], depths: Sequence[int], parallels: Sequence[int]
) -> list[BenchTest]:
    """Every combination: a test of each prompt length and of each generation length; 0 leaves one out."""
    return [
        BenchTest(n_prompt, n_gen, n_depth, n_parallel)
        for n_parallel in parallels
        for n_depth in depths
        for n_prompt, n_gen in [*((p, 0) for p in prompts), *((0, g) for g in gens)]
        if n_prompt + n_gen > 0
    ]


def pages_needed(test: BenchTest, block_size: int, n_groups: int = 1) -> int:
    """KV pages that a test fills in all KV groups; none are given back."""
    return n_groups * test.n_parallel * -(-test.n_ctx // block_size)


class BenchRunner:
    """Runs tests on an open stage, which must have the pages and the context for them."""

    def __init__(
        self, stage: Stage, *, n_vocab: int, block_size: int, max_tokens: int, n_groups: int = 1, seed: int = 0
    ) -> None:
        self._stage = stage
        self._n_vocab = n_vocab
        self._block_size = block_size
        self._max_tokens = max_tokens  # per step
        self._n_groups = n_groups
        self._random = np.random.default_rng(seed)
        self._sampling = stage if isinstance(stage, SamplingStage) and stage.can_sample else None
        self._overlapping = stage if isinstance(stage, OverlappingStage) and stage.can_overlap else None
        self._greedy = [RowSampling(row=row) for row in range(max_tokens)]

    def run(self, test: BenchTest, repetitions: int, on_sample: Callable[[int], None] | None = None) -> BenchResult:
        """A warm-up, then `repetitions` samples; `on_sample` hears the number of each before it starts (0: warm-up)."""
        batches = _Batches(test, self._block_size, self._max_tokens, self._n_groups, self._n_vocab, self._random)
        if on_sample:
            on_sample(0)
        self._steps((*batches.prompt(0, test.n_depth, want_logits=False), *batches.measured(min(test.n_gen, 4))))
        samples = []
        for number in range(1, repetitions + 1):
            if on_sample:
                on_sample(number)
            begin = time.perf_counter_ns()
            self._steps(batches.measured(test.n_gen))
            samples.append(time.perf_counter_ns() - begin)
        return BenchResult(test, tuple(samples))

    def _steps(self, batches: Iterable[Batch]) -> None:
        """One after another, each started before the last one's tokens are fetched where the engine would do that too."""
        if self._overlapping is None:
            for batch in batches:
                self._step(batch)
            return
        ticket: int | None = None
        for batch in batches:
            started = self._overlapping.start_sampled(batch, self._greedy[: len(batch.output_rows)])
            if ticket is not None:
                self._overlapping.fetch_sampled(ticket)
            ticket = started
        if ticket is not None:
            self._overlapping.fetch_sampled(ticket)

    def _step(self, batch: Batch) -> None:
        n_outputs = len(batch.output_rows)
        if self._sampling is not None and n_outputs:
            self._sampling.run_sampled(batch, self._greedy[:n_outputs], None)
        else:
            self._stage.run(batch)


class _Batches:
    """The steps of one test. Every sequence has pages of its own in each group, its tokens are row s of `ids`."""

    def __init__(
        self,
        test: BenchTest,
        block_size: int,
        max_tokens: int,
        n_groups: int,
        n_vocab: int,
        random: np.random.Generator,
    ) -> None:
        self._test, self._block_size, self._max_tokens = test, block_size, max_tokens
        shape = (n_groups, test.n_parallel, -(-test.n_ctx // block_size))
        self._table = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        self._ids = random.integers(0, n_vocab, (test.n_parallel, test.n_ctx), dtype=np.int32)

    def measured(self, n_gen: int) -> Iterator[Batch]:
        """What the clock sees, built as it goes: the whole prompt, then `n_gen` steps of one token a sequence."""
        test = self._test
        yield from self.prompt(test.n_depth, test.n_prompt, want_logits=True)
        first = test.n_depth + test.n_prompt
        for position in range(first, first + n_gen):
            for low in range(0, test.n_parallel, self._max_tokens):
                yield self._decode(low, min(low + self._max_tokens, test.n_parallel), position)

    def prompt(self, start: int, length: int, *, want_logits: bool) -> Iterator[Batch]:
        """Positions start..start+length of every sequence, one sequence after the other, in steps as full as may be."""
        end, room = start + length, self._max_tokens
        spans: list[tuple[int, int, int]] = []  # sequence, first position, end
        for sequence in range(self._test.n_parallel):
            low = start
            while low < end:
                high = min(end, low + room)
                spans.append((sequence, low, high))
                low, room = high, room - (high - low)
                if room == 0:
                    yield self._chunk(spans, end if want_logits else -1)
                    spans, room = [], self._max_tokens
        if spans:
            yield self._chunk(spans, end if want_logits else -1)

    def _chunk(self, spans: list[tuple[int, int, int]], end: int) -> Batch:
        """The tokens of `spans`; a span that reaches `end` wants the logits of its last token."""
        lengths = np.array([high - low for _, low, high in spans], np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        sequences = np.repeat(np.arange(spans[0][0], spans[-1][0] + 1), lengths)
        positions = np.concatenate([np.arange(low, high, dtype=np.int32) for _, low, high in spans])
        wanted = [starts[i + 1] - 1 for i, (_, _, high) in enumerate(spans) if high == end]
        return Batch(
            token_ids=self._ids[sequences, positions],
            positions=positions,
            slots=self._slots(sequences, positions),
            sequence_starts=starts,
            page_tables=self._table[:, spans[0][0] : spans[-1][0] + 1],
            output_rows=np.array(wanted, np.int32),
        )

    def _decode(self, low: int, high: int, position: int) -> Batch:
        """One token of each sequence in low..high, all at one position."""
        count = np.arange(high - low + 1, dtype=np.int32)
        positions = np.full(high - low, position, np.int32)
        return Batch(
            token_ids=np.ascontiguousarray(self._ids[low:high, position]),
            positions=positions,
            slots=self._slots(count[:-1] + low, positions),
            sequence_starts=count,
            page_tables=self._table[:, low:high],
            output_rows=count[:-1],
        )

    def _slots(self, sequences: npt.NDArray[np.integer], positions: Int32) -> Int32:
        page, offset = np.divmod(positions, self._block_size)
        slots: Int32 = self._table[:, sequences, page] * np.int32(self._block_size) + offset
        return slots
