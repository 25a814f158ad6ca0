"""An engine whose stage samples says what any engine says: chunk by chunk, one step at a time or several ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_stage import FakeStage, FakeVocabulary
from plain_engine import prompt_of
from sampling_requests import CONFIG, REQUESTS, run, whole
from sampling_stage import SamplingFake

from pyinfer.graph.sampling import SamplingStage
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.stage_chain import StageChain

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("params", REQUESTS, ids=lambda params: next(iter(params)))
@pytest.mark.parametrize("multi_step", [1, 4, 32])
def test_each_kind_of_request_alone(params: dict[str, Any], multi_step: int) -> None:
    expected, _ = run(FakeStage(CONFIG), [params, params])
    chunks, _ = run(SamplingFake(CONFIG), [params, params], multi_step=multi_step)
    assert {key: whole(each) for key, each in chunks.items()} == {key: whole(each) for key, each in expected.items()}


@pytest.mark.parametrize("multi_step", [1, 3, 8])
@pytest.mark.parametrize("n_pages", [64, 14])
def test_all_kinds_together(multi_step: int, n_pages: int) -> None:
    config = replace(CONFIG, n_pages=n_pages, n_ctx=200)
    expected, _ = run(FakeStage(config), REQUESTS, config)
    stage = SamplingFake(config)
    chunks, engine = run(stage, REQUESTS, config, multi_step=multi_step)
    assert {key: whole(each) for key, each in chunks.items()} == {key: whole(each) for key, each in expected.items()}
    assert engine.scheduler.pool.n_held == 0 and stage.n_whole > 0


def test_only_what_needs_rows_takes_them() -> None:
    stage = SamplingFake(CONFIG)
    run(stage, [{"top_k": 4}, {"logprobs": 2}, {"presence_penalty": 1.0}])
    assert stage.n_whole == 0 and stage.n_sampled == stage.n_steps and stage.n_ahead == 0


def test_steps_ahead_come_in_one_chunk() -> None:
    stage = SamplingFake(CONFIG, max_steps=6)
    chunks, engine = run(stage, [{"ignore_eos": True}, {"ignore_eos": True, "temperature": 0}], multi_step=100)
    assert stage.n_ahead > 15 and stage.n_steps < 30
    assert max(len(chunk.new_token_ids) for chunk in chunks["0", 0]) == 6
    assert engine.stats().generation_tokens == 50
    plain, plain_engine = run(FakeStage(CONFIG), [{"ignore_eos": True}, {"ignore_eos": True, "temperature": 0}])
    assert [whole(c) for c in chunks.values()] == [whole(c) for c in plain.values()]
    assert engine.stats().steps >= plain_engine.stats().steps


def test_logits_that_are_not_finite_fail_the_request_after_its_tokens() -> None:
    stage = SamplingFake(CONFIG)
    stage.broken_at = 4
    chunks, engine = run(stage, [{"ignore_eos": True}], multi_step=8)
    assert chunks["0", 0][-1].failure is not None and "not finite" in chunks["0", 0][-1].failure.message
    assert sum(len(chunk.new_token_ids) for chunk in chunks["0", 0]) == 3
    assert engine.scheduler.pool.n_held == 0


def test_beams_beside_sampling() -> None:
    def search(stage: FakeStage) -> list[tuple[str, list[int]]]:
        engine = Engine(stage, CONFIG, FakeVocabulary(), multi_step=4)
        engine.add_beam_search("b", prompt_of(9), BeamSearchParams(beam_width=3, max_tokens=6))
        engine.add_request("s", prompt_of(5), SamplingParams(seed=1, max_tokens=12, ignore_eos=True))
        found: dict[str, list[int]] = {}
        while engine.has_work:
            for output in engine.step():
                found.setdefault(f"{output.request_id}{output.index}", []).extend(output.new_token_ids)
        return sorted(found.items())

    assert search(SamplingFake(CONFIG)) == search(FakeStage(CONFIG))


def test_a_chain_samples_if_its_last_stage_does() -> None:
    plain, sampling = FakeStage(CONFIG), SamplingFake(CONFIG)
    assert isinstance(sampling, SamplingStage) and not isinstance(plain, SamplingStage)
    assert StageChain([plain, sampling]).can_sample and not StageChain([sampling, plain]).can_sample
    chain = StageChain([plain, sampling])
    assert (chain.max_steps, chain.max_edits, chain.max_logprobs) == (1, 1000, 5)
    expected, _ = run(FakeStage(CONFIG), REQUESTS[:5])
    chunks, _ = run(chain, REQUESTS[:5], multi_step=4)  # type: ignore[arg-type]
    assert {key: whole(each) for key, each in chunks.items()} == {key: whole(each) for key, each in expected.items()}
    assert sampling.n_sampled > 0
