"""The bench's batches: what a stage is asked to run, checked by a stage that verifies each of them."""

from __future__ import annotations

import numpy as np
import pytest
from fake_stage import N_VOCAB, FakeStage
from sampling_stage import OverlappingFake

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.runtime.bench import BenchResult, BenchRunner, BenchTest, make_tests, pages_needed

pytestmark = pytest.mark.unit


class RecordingStage(FakeStage):
    """Keeps the batches; FakeStage checks slots, tables and sizes of each."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__(config)
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> np.ndarray:
        self.batches.append(batch)
        return super().run(batch)


def run(test: BenchTest, *, max_tokens: int = 8, repetitions: int = 2) -> tuple[RecordingStage, BenchResult, list[int]]:
    config = StageConfig(
        n_pages=pages_needed(test, 16), max_tokens=max_tokens, max_sequences=test.n_parallel, n_ctx=test.n_ctx
    )
    stage = RecordingStage(config)
    heard: list[int] = []
    runner = BenchRunner(stage, n_vocab=N_VOCAB, block_size=16, max_tokens=max_tokens)
    result = runner.run(test, repetitions, heard.append)
    assert heard == list(range(repetitions + 1))
    return stage, result, heard


def test_prompt_goes_in_full_steps_with_one_row_of_logits() -> None:
    stage, result, _ = run(BenchTest(n_prompt=20, n_gen=0))
    assert [b.n_tokens for b in stage.batches] == [8, 8, 4] * 3  # a warm-up and two samples
    assert [b.output_rows.tolist() for b in stage.batches] == [[], [], [3]] * 3
    assert result.test.name == "pp20" and len(result.samples_ns) == 2


def test_generation_is_one_token_a_step_with_its_logits() -> None:
    stage, _, _ = run(BenchTest(n_prompt=0, n_gen=6))
    assert [b.n_tokens for b in stage.batches] == [1] * (4 + 6 + 6)  # the warm-up is shorter
    assert [int(b.positions[0]) for b in stage.batches[4:10]] == list(range(6))
    assert all(b.output_rows.tolist() == [0] for b in stage.batches)


def test_depth_is_filled_once_and_without_logits() -> None:
    stage, result, _ = run(BenchTest(n_prompt=0, n_gen=3, n_depth=10))
    filling, rest = stage.batches[:2], stage.batches[2:]
    assert [b.n_tokens for b in filling] == [8, 2] and all(len(b.output_rows) == 0 for b in filling)
    assert [int(b.positions[0]) for b in rest] == [10, 11, 12] * 3
    assert result.test.name == "tg3 @ d10"


def test_sequences_run_together_on_their_own_pages() -> None:
    stage, _, _ = run(BenchTest(n_prompt=5, n_gen=0, n_parallel=3), repetitions=1)
    first, second = stage.batches[:2]
    assert [b.n_tokens for b in (first, second)] == [8, 7]
    assert first.sequence_starts.tolist() == [0, 5, 8] and second.sequence_starts.tolist() == [0, 2, 7]
    assert first.output_rows.tolist() == [4] and second.output_rows.tolist() == [1, 6]
    stage, _, _ = run(BenchTest(n_prompt=0, n_gen=2, n_parallel=20))
    assert [b.n_sequences for b in stage.batches[:3]] == [8, 8, 4]
    tables = np.concatenate([b.page_tables for b in stage.batches[:3]], axis=1)
    assert len(np.unique(tables)) == tables.size


def test_tokens_are_random_and_repeatable() -> None:
    ids = [run(BenchTest(n_prompt=64, n_gen=0), max_tokens=64)[0].batches[0].token_ids for _ in range(2)]
    assert (ids[0] == ids[1]).all() and len(np.unique(ids[0])) > 20


def test_steps_overlap_where_the_stage_can() -> None:
    """All that were started are fetched, each behind the start of the next."""
    test = BenchTest(n_prompt=20, n_gen=6, n_parallel=3)
    config = StageConfig(n_pages=pages_needed(test, 16), max_tokens=8, max_sequences=3, n_ctx=test.n_ctx)
    stage = OverlappingFake(config)
    BenchRunner(stage, n_vocab=N_VOCAB, block_size=16, max_tokens=8).run(test, 2)
    assert stage.n_started == stage.n_steps and not stage._tickets
    plain = FakeStage(config)
    BenchRunner(plain, n_vocab=N_VOCAB, block_size=16, max_tokens=8).run(test, 2)
    assert plain.n_steps == stage.n_steps and (plain.kv == stage.kv).all()


def test_statistics() -> None:
    result = BenchResult(BenchTest(n_prompt=0, n_gen=100, n_parallel=2), (10**9, 2 * 10**9))
    assert result.samples_ts == (200.0, 100.0)
    assert (result.avg_ts, result.avg_ns) == (150.0, 1.5e9)
    assert result.stddev_ts == pytest.approx(np.std([200, 100], ddof=1))
    assert BenchResult(result.test, (5,)).stddev_ns == 0


def test_combinations() -> None:
    names = [(t.name, t.n_parallel) for t in make_tests([512, 0], [128, 0], [0, 4096], [1, 8])]
    assert names == [(n, b) for b in (1, 8) for n in ("pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096")]
    assert make_tests([0], [0], [0], [1]) == []
    assert pages_needed(BenchTest(10, 0, 7, 3), 16) == 6
