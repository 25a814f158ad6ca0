"""Steps that are started before the last one's tokens are known: the same chunks, and the device is never out of work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_stage import FakeStage, FakeVocabulary
from plain_engine import alone, prompt_of
from sampling_requests import CONFIG, REQUESTS, run, whole
from sampling_stage import OverlappingFake

from pyinfer.graph.batch import Batch
from pyinfer.graph.sampling import OverlappingStage, RowSampling, Sampled
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit
PLAIN: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"top_k": 5, "top_p": 0.9},
    {"min_p": 0.1, "temperature": 0.7},
    {"logit_bias": {4: 5.0, 9: -3.0}},
    {"stop_token_ids": list(range(20))},
    {"logprobs": 3},
]


class Diary(OverlappingFake):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.entries: list[str] = []

    def start_sampled(self, batch: Batch, rows: list[RowSampling]) -> int:  # type: ignore[override]
        ticket = super().start_sampled(batch, rows)
        self.entries.append(f"start {ticket}")
        return ticket

    def fetch_sampled(self, ticket: int) -> Sampled:
        self.entries.append(f"fetch {ticket}")
        return super().fetch_sampled(ticket)


def engine_of(stage: OverlappingFake) -> Engine:
    return Engine(stage, stage.config, FakeVocabulary())


def drain(engine: Engine) -> list[RequestOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check()
    return outputs


def tokens_of(outputs: list[RequestOutput], request_id: str) -> list[int]:
    return [token for output in outputs if output.request_id == request_id for token in output.new_token_ids]


@pytest.mark.parametrize("params", [*REQUESTS, *PLAIN], ids=lambda params: next(iter(params)))
def test_each_kind_of_request_alone(params: dict[str, Any]) -> None:
    expected, _ = run(FakeStage(CONFIG), [params, params])
    chunks, _ = run(OverlappingFake(CONFIG), [params, params])
    assert {key: whole(each) for key, each in chunks.items()} == {key: whole(each) for key, each in expected.items()}


@pytest.mark.parametrize("requests", [REQUESTS, 4 * PLAIN], ids=["all", "plain"])
@pytest.mark.parametrize("n_pages", [64, 14])
def test_many_together(requests: list[dict[str, Any]], n_pages: int) -> None:
    config = replace(CONFIG, n_pages=n_pages, n_ctx=200)
    expected, _ = run(FakeStage(config), requests, config, prefix_caching=False)
    stage = OverlappingFake(config)
    chunks, engine = run(stage, requests, config, prefix_caching=False)
    assert {key: whole(each) for key, each in chunks.items()} == {key: whole(each) for key, each in expected.items()}
    assert engine.scheduler.pool.n_held == 0 and isinstance(stage, OverlappingStage)
    assert stage.n_started == stage.n_steps if requests is not REQUESTS else stage.n_started < stage.n_steps


def test_the_next_step_is_started_before_the_last_ones_tokens_are_fetched() -> None:
    stage = Diary()
    engine = engine_of(stage)
    engine.add_request("a", prompt_of(80), SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    outputs = drain(engine)
    assert len(tokens_of(outputs, "a")) == 4
    # two steps for the prompt, three for what follows; the length is foreseen
    assert stage.entries == [
        "start 1", "start 2", "fetch 1", "start 3", "fetch 2", "start 4", "fetch 3", "start 5", "fetch 4", "fetch 5",
    ]  # fmt: skip
    assert [event.kind for event in engine.events] == []


def test_the_first_call_tells_of_both_steps_that_it_started() -> None:
    engine = engine_of(OverlappingFake(CONFIG))
    engine.add_request("a", prompt_of(80), SamplingParams(max_tokens=4, ignore_eos=True))
    assert engine.step() == []
    assert [(event.kind, event.n_tokens) for event in engine.events] == [("scheduled", 0), ("prompt", 64)]


def test_a_step_in_flight_is_dropped_for_who_stopped() -> None:
    params = [SamplingParams(seed=i, max_tokens=60, stop_token_ids=[1, 2, 3]) for i in (1, 2, 5)]
    expected = [alone(prompt_of(9, i), params[i]) for i in range(3)]
    assert len({len(tokens) for tokens in expected} - {60}) == 3, "they stop at different steps"
    stage = OverlappingFake(CONFIG)
    engine = engine_of(stage)
    for i in range(3):
        engine.add_request(str(i), prompt_of(9, i), params[i])
    outputs = drain(engine)
    assert [tokens_of(outputs, str(i)) for i in range(3)] == expected
    assert stage.n_started == max(map(len, expected)) + 1
    engine.add_request("3", prompt_of(9, 1), params[1])
    assert tokens_of(drain(engine), "3") == expected[1]


def test_a_request_that_needs_its_tokens_stops_the_overlap_while_it_runs() -> None:
    stage = Diary()
    engine = engine_of(stage)
    params = SamplingParams(seed=3, max_tokens=20, ignore_eos=True)
    history = SamplingParams(seed=4, max_tokens=5, ignore_eos=True, repetition_penalty=1.5)
    engine.add_request("a", prompt_of(9), params)
    outputs = engine.step() + engine.step()
    engine.add_request("b", prompt_of(7), history)
    while not any(output.request_id == "b" and output.finish_reason for output in outputs):
        n_started = stage.n_started
        outputs += engine.step()
        assert stage.n_started == n_started
    assert len(stage._tickets) == 0
    outputs += drain(engine)
    assert stage.n_started > n_started
    assert tokens_of(outputs, "a") == alone(prompt_of(9), params)
    assert tokens_of(outputs, "b") == alone(prompt_of(7), history)


@pytest.mark.parametrize("n_most", [3 * 16, 2 * 16])
def test_more_edits_than_the_stage_takes_for_every_row(n_most: int) -> None:
    stage = OverlappingFake(CONFIG, n_most=n_most)
    params = SamplingParams(seed=2, max_tokens=5, logit_bias={1: 2.0, 2: 3.0, 3: -4.0})
    engine = engine_of(stage)
    engine.add_request("a", prompt_of(9), params)
    assert tokens_of(drain(engine), "a") == alone(prompt_of(9), params)
    assert (stage.n_started > 0) == (n_most == 48)


def test_a_step_that_fails_takes_its_own_requests_and_no_prefix_of_it_is_kept() -> None:
    stage = OverlappingFake(CONFIG)
    stage.fail_at = 2
    engine = engine_of(stage)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.add_request("a", prompt_of(100), params)  # its second piece fails, with a third one in flight
    outputs = engine.step() + engine.step()
    assert [output.failure is not None for output in outputs] == [True]
    engine.check()
    engine.add_request("b", prompt_of(100), params)
    outputs = drain(engine)
    assert tokens_of(outputs, "b") == alone(prompt_of(100), params)
    assert outputs[0].cached_tokens == 64, "what the first step stored"


def test_an_aborted_request_leaves_its_step_in_flight() -> None:
    stage = OverlappingFake(CONFIG)
    engine = engine_of(stage)
    params = SamplingParams(seed=5, max_tokens=30, ignore_eos=True)
    engine.add_request("a", prompt_of(9), params)
    engine.add_request("b", prompt_of(8), params)
    outputs = engine.step() + engine.step()
    n_before = len(tokens_of(outputs, "a"))
    assert [output.finish_reason for output in engine.abort("a")] == ["abort"]
    engine.check()
    outputs += drain(engine)
    assert len(tokens_of(outputs, "a")) == n_before and tokens_of(outputs, "b") == alone(prompt_of(8), params)


def test_logits_that_are_not_finite_fail_the_request() -> None:
    stage = OverlappingFake(CONFIG)
    stage.broken_at = 4
    engine = engine_of(stage)
    engine.add_request("a", prompt_of(9), SamplingParams(max_tokens=9, ignore_eos=True))
    outputs = drain(engine)
    assert len(tokens_of(outputs, "a")) == 3
    assert outputs[-1].failure is not None and "not finite" in outputs[-1].failure.message
    assert engine.scheduler.pool.n_held == 0
