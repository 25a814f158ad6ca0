"""Forks: samples and beams share pages and write into copies; what sharing saves is read from the pool."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import pytest
from fake_stage import FakeStage, FakeVocabulary
from plain_engine import beams_alone, prompt_of

from pyinfer.errors import RequestError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.graph.ops import F32Array
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit

CONFIG = StageConfig(n_pages=64, block_size=16, max_tokens=64, max_sequences=16, n_ctx=256)


def new_engine(config: StageConfig = CONFIG, **options: object) -> Engine:
    return Engine(FakeStage(config), config, FakeVocabulary(), **options)  # type: ignore[arg-type]


def drive(engine: Engine) -> dict[str, list[RequestOutput]]:
    chunks: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.failure is None, output
            chunks.setdefault(output.request_id, []).append(output)
        engine.check()
    assert engine.stats().pages_used == 0
    return chunks


def count_pages(engine: Engine, held: list[int]) -> None:
    """Append how many pages are held in each step."""
    run, pool = engine._stage.run, engine.scheduler.pool

    def counted(batch: Batch) -> F32Array:
        held.append(pool.n_held)
        return run(batch)

    engine._stage.run = counted  # type: ignore[method-assign]


@pytest.mark.parametrize(("block_size", "apart", "shared", "saved"), [(16, 352, 160, 54.5), (1, 5584, 2512, 55.0)])
def test_four_samples_of_a_long_prompt_share_its_pages(block_size: int, apart: int, shared: int, saved: float) -> None:
    """Prompt 1024, output 372 (a 373rd token is sampled, and never stored), counted by the pool in each step."""
    config = StageConfig(n_pages=6000, block_size=block_size, max_tokens=4096, max_sequences=4, n_ctx=1400)
    params = SamplingParams(max_tokens=373, ignore_eos=True)
    peaks = []
    for n_samples, n_requests in ((1, 4), (4, 1)):
        engine = new_engine(config, prefix_caching=False)
        held: list[int] = []
        count_pages(engine, held)
        for i in range(n_requests):
            engine.add_request(str(i), prompt_of(1024), params.replace(n=n_samples, seed=i))
        drive(engine)
        peaks.append(max(held))
    assert peaks == [apart, shared]
    assert round(100 * (1 - peaks[1] / peaks[0]), 1) == saved


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_a_shared_last_page_is_copied_by_all_but_one(length: int) -> None:
    engine = new_engine()
    copies: list[tuple[int, int]] = []
    stage = engine._stage
    copy = stage.copy_page

    def noted(source: int, target: int) -> None:
        copies.append((source, target))
        copy(source, target)

    stage.copy_page = noted  # type: ignore[method-assign]
    engine.add_request("a", prompt_of(length), SamplingParams(n=4, max_tokens=20, seed=1, ignore_eos=True))
    chunks = drive(engine)["a"]
    assert len(copies) == (0 if length % 16 == 0 else 3) and len({a for a, _ in copies}) <= 1
    for index in range(4):
        single = new_engine()
        single.add_request("b", prompt_of(length), SamplingParams(n=4, max_tokens=20, seed=1, ignore_eos=True))
        for other in set(range(4)) - {index}:
            single.abort("b", other)
        expected = [t for c in drive(single)["b"] for t in c.new_token_ids]
        assert [t for c in chunks if c.index == index for t in c.new_token_ids] == expected


@pytest.mark.parametrize("max_sequences", [1, 2, 3])
def test_samples_without_a_place_wait_and_get_the_same_tokens(max_sequences: int) -> None:
    params = SamplingParams(n=5, max_tokens=20, seed=1, ignore_eos=True)
    results = []
    for config in (CONFIG, replace(CONFIG, max_sequences=max_sequences, n_pages=6, n_ctx=64)):
        engine = new_engine(config)
        engine.add_request("a", prompt_of(20), params)
        results.append(
            [
                [t for c in chunks if c.index == i for t in c.new_token_ids]
                for chunks in [drive(engine)["a"]]
                for i in range(5)
            ]
        )
    assert results[0] == results[1]


# ---- beam search


def found(chunks: list[RequestOutput]) -> list[tuple[list[int], float]]:
    assert [c.index for c in chunks] == list(range(len(chunks)))
    return [(c.new_token_ids, c.cumulative_logprob or 0.0) for c in chunks]


def assert_same(ours: list[tuple[list[int], float]], expected: list[tuple[list[int], float]]) -> None:
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in expected]
    assert [total for _, total in ours] == pytest.approx([total for _, total in expected], abs=1e-4)


@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (2, 0.0), (4, 1.0), (4, 2.5), (8, -1.0), (20, 1.0)])
@pytest.mark.parametrize("length", [1, 16, 30])
def test_beams_are_those_of_a_plain_search(width: int, penalty: float, length: int) -> None:
    for max_tokens, ignore_eos in itertools.product((1, 25), (False, True)):
        params = BeamSearchParams(
            beam_width=width, max_tokens=max_tokens, length_penalty=penalty, ignore_eos=ignore_eos
        )
        engine = new_engine(replace(CONFIG, max_sequences=48, n_pages=256))
        engine.add_beam_search("a", prompt_of(length, length), params)
        assert_same(found(drive(engine)["a"]), beams_alone(prompt_of(length, length), params))


def test_early_stopping_takes_the_first_texts_to_be_complete() -> None:
    n_other = 0
    for seed in range(12):
        params = BeamSearchParams(beam_width=3, max_tokens=30, length_penalty=2.5, early_stopping=True)
        engine = new_engine(replace(CONFIG, n_pages=256))
        engine.add_beam_search("a", prompt_of(20, seed), params)
        ours = found(drive(engine)["a"])
        assert_same(ours, beams_alone(prompt_of(20, seed), params))
        patient = beams_alone(prompt_of(20, seed), msgspec.structs.replace(params, early_stopping=False))
        n_other += [tokens for tokens, _ in ours] != [tokens for tokens, _ in patient]
    assert n_other > 0


def test_no_more_beams_than_tokens() -> None:
    with pytest.raises(RequestError, match="beam_width is 200; it must be at most the vocabulary's size"):
        new_engine(CONFIG).add_beam_search("a", [1], BeamSearchParams(beam_width=200))


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, max_sequences=2),
        replace(CONFIG, max_tokens=3),
        replace(CONFIG, n_pages=7, n_ctx=100),
        replace(CONFIG, n_pages=5, n_ctx=80, max_sequences=3),
    ],
)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_beams_that_give_way_to_each_other_and_to_others_find_the_same(
    config: StageConfig, prefix_caching: bool
) -> None:
    engine = new_engine(config, prefix_caching=prefix_caching)
    params = BeamSearchParams(beam_width=4, max_tokens=40, ignore_eos=True)
    for i in range(3):
        engine.add_beam_search(str(i), prompt_of(20 + i, i), params)
    engine.add_request("beside", prompt_of(30, 9), SamplingParams(max_tokens=30, ignore_eos=True, n=2, seed=0))
    chunks = drive(engine)
    for i in range(3):
        assert_same(found(chunks[str(i)]), beams_alone(prompt_of(20 + i, i), params, config.n_ctx))
    if config.n_pages < 10:
        assert engine.stats().preemptions > 0


def test_beams_share_and_free_their_pages() -> None:
    engine = new_engine(replace(CONFIG, n_pages=256))
    engine.add_beam_search("a", prompt_of(160), BeamSearchParams(beam_width=8, max_tokens=20, ignore_eos=True))
    peak = 0
    while engine.has_work:
        engine.step()
        engine.check()
        peak = max(peak, engine.scheduler.pool.n_held)
    assert 10 < peak <= 10 + 8 * 2


def test_a_beam_search_can_be_aborted_at_any_step() -> None:
    for n_steps in range(12):
        engine = new_engine(replace(CONFIG, n_pages=8, n_ctx=100))
        engine.add_beam_search("a", prompt_of(40), BeamSearchParams(beam_width=4, max_tokens=60, ignore_eos=True))
        for _ in range(n_steps):
            engine.step()
        outputs = engine.abort("a", 1)
        assert [(output.index, output.finish_reason) for output in outputs] == [(i, "abort") for i in range(4)]
        engine.check()
        assert not engine.has_work and engine.stats().pages_used == 0 and engine.stats().requests_finished == 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens is 0"),
        ({"beam_width": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"beam_width": 2, "temperature": -1}, "temperature"),
    ],
)
def test_beam_parameters_name_what_is_wrong(fields: dict[str, float], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        BeamSearchParams(**fields)  # type: ignore[arg-type]
