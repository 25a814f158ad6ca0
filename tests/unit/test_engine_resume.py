"""A request goes on in a new engine from what an old one produced: same tokens, no second prompt logprobs."""

from __future__ import annotations

import pytest
from fake_stage import FakeStage, FakeVocabulary

from pyinfer.graph.backend import StageConfig
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit

CONFIG = StageConfig(n_pages=64, block_size=16, max_tokens=32, max_sequences=16, n_ctx=256)
PARAMS = SamplingParams(
    n=3, seed=5, max_tokens=40, ignore_eos=True, logprobs=1, prompt_logprobs=1, repetition_penalty=1.2,
    frequency_penalty=0.3, bad_words=["a"], min_tokens=3,
)  # fmt: skip
PROMPT = list(range(8, 48))


def engine() -> Engine:
    return Engine(FakeStage(CONFIG), CONFIG, FakeVocabulary())


def run(engine: Engine, n_steps: int = 1000) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while engine.has_work and n_steps:
        outputs += engine.step()
        engine.check()
        n_steps -= 1
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(PARAMS.n)]
    for output in outputs:
        assert output.failure is None
        tokens[output.index] += output.new_token_ids
    return tokens


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 5, 20])
def test_goes_on_as_if_nothing_had_been(n_steps: int) -> None:
    whole = engine()
    whole.add_request("a", PROMPT, PARAMS)
    expected = run(whole)
    first = engine()
    first.add_request("a", PROMPT, PARAMS)
    before = run(first, n_steps)
    second = engine()
    second.add_request("a", PROMPT, PARAMS, resume=list(tokens_of(before)))
    after = run(second)
    assert tokens_of(before + after) == tokens_of(expected)
    logprobs = {i: [o.new_logprobs for o in before + after if o.index == i] for i in range(3)}
    assert logprobs == {i: [o.new_logprobs for o in expected if o.index == i] for i in range(3)}
    assert [o.prompt_logprobs for o in before + after if o.prompt_logprobs] == [
        o.prompt_logprobs for o in expected if o.prompt_logprobs
    ]


def test_samples_that_ended_stay_ended() -> None:
    whole = engine()
    whole.add_request("a", PROMPT, PARAMS)
    expected = tokens_of(run(whole))
    second = engine()
    second.add_request("a", PROMPT, PARAMS, resume=[None, expected[1][:7], None])
    after = run(second)
    assert tokens_of(after) == [[], expected[1][7:], []]
    assert sum(output.finish_reason is not None for output in after) == 1
    assert second.stats().requests_finished == 1


def test_events_tell_what_a_step_did() -> None:
    it = engine()
    it.add_request("a", PROMPT, PARAMS.replace(n=1, prompt_logprobs=None))
    seen = []
    while it.has_work:
        it.step()
        seen += [(event.kind, event.n_tokens) for event in it.events]
    assert seen == [("scheduled", 0), ("prompt", 32), ("prompt", 8)]
    it.add_request("b", PROMPT, PARAMS.replace(n=1, prompt_logprobs=None))
    it.step()
    assert [(e.request_id, e.kind, e.n_tokens) for e in it.events] == [("b", "scheduled", 32), ("b", "prompt", 8)]


def test_events_name_who_preempted() -> None:
    config = StageConfig(n_pages=6, block_size=16, max_tokens=32, max_sequences=4, n_ctx=96)
    it = Engine(FakeStage(config), config, FakeVocabulary())
    for name in ("first", "second"):
        it.add_request(name, PROMPT[:30], SamplingParams(max_tokens=60, ignore_eos=True, seed=1))
    seen = []
    while it.has_work:
        it.step()
        seen += [event for event in it.events if event.kind == "preempted"]
    assert seen and {event.request_id for event in seen} == {"second"}
    assert seen[0].by == "first" and seen[0].n_tokens == 47  # it came a step later
