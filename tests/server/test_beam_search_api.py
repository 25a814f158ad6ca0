"""Beam search over HTTP with the real client: the texts and scores that `LLM.beam_search` finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from dying_engine import Death, deadly
from serve_process import serving

from pyinfer import LLM, BeamSearchParams
from pyinfer.runtime.chat_prompt import chat_prompt
from pyinfer.runtime.outputs import BeamSearchSequence

pytestmark = pytest.mark.server

USER: list[Any] = [{"role": "user", "content": "the sea"}]


@pytest.fixture(scope="module")
def llm(server: Any) -> Iterator[LLM]:
    """The same model without a server."""
    with LLM(server.service.model().path, n_threads=1, kv_cache_memory=4 << 20) as llm:
        yield llm


def text_of(llm: LLM, beam: BeamSearchSequence, prompt: list[int]) -> str:
    """Without the prompt, whose bytes may end within a character of the text."""
    tokenizer = llm.model.tokenizer
    return b"".join(tokenizer.shown_bytes(token, True) for token in beam.tokens[len(prompt) :]).decode(
        "utf-8", "replace"
    )


def logprobs_of(beam: BeamSearchSequence, prompt: list[int]) -> list[float]:
    entries = beam.logprobs[: len(beam.tokens) - len(prompt)]
    return [next(iter(entry.values())).logprob for entry in entries]


@pytest.mark.parametrize("fields", [{}, {"length_penalty": 0.0}, {"length_penalty": 2.5}, {"early_stopping": True}])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_completions_are_the_beams(server: Any, llm: LLM, fields: dict[str, Any], ignore_eos: bool) -> None:
    prompts = ["the sea", "a bone and tin"]
    params = BeamSearchParams(beam_width=4, max_tokens=9, ignore_eos=ignore_eos, **fields)
    extra = {"use_beam_search": True, "ignore_eos": ignore_eos, **fields}
    reply = server.openai.completions.create(
        model="tiny", prompt=prompts, n=3, best_of=4, temperature=0, max_tokens=9, logprobs=0, extra_body=extra
    )
    assert [choice.index for choice in reply.choices] == list(range(6))
    n_tokens = 0
    for number, (prompt, output) in enumerate(zip(prompts, llm.beam_search(prompts, params), strict=True)):
        ids = llm.tokenize(prompt)
        for choice, beam in zip(reply.choices[3 * number :], output.sequences[:3], strict=False):
            assert choice.text == text_of(llm, beam, ids)
            assert choice.finish_reason == beam.finish_reason
            assert choice.logprobs.token_logprobs == pytest.approx(logprobs_of(beam, ids), abs=1e-9)
            n_tokens += len(choice.logprobs.tokens)
    assert reply.usage.completion_tokens == n_tokens > 0
    server.wait_idle()
    assert server.client.stats().pages_used == 0


def test_chat_answers_are_the_beams(server: Any, llm: LLM) -> None:
    ids = chat_prompt(llm.model.chat_template, llm.model.tokenizer, USER)
    reply = server.openai.chat.completions.create(
        model="tiny", messages=USER, n=4, max_completion_tokens=7, logprobs=True, extra_body={"use_beam_search": True}
    )
    [output] = llm.beam_search([ids], BeamSearchParams(beam_width=4, max_tokens=7))
    for choice, beam in zip(reply.choices, output.sequences, strict=True):
        assert choice.message.content == text_of(llm, beam, ids)
        assert [t.logprob for t in choice.logprobs.content] == pytest.approx(logprobs_of(beam, ids), abs=1e-9)
    wider = server.openai.chat.completions.create(
        model="tiny", messages=USER, max_tokens=7, extra_body={"use_beam_search": True, "best_of": 4}
    )
    assert [c.message.content for c in wider.choices] == [reply.choices[0].message.content]
    assert wider.choices[0].logprobs is None


def test_without_max_tokens_a_chat_goes_on_to_the_end_of_the_context(server: Any) -> None:
    extra = {"use_beam_search": True, "best_of": 2, "ignore_eos": True}
    reply = server.openai.chat.completions.create(model="tiny", messages=USER, extra_body=extra)
    assert reply.usage.total_tokens == 512 and reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": 0.7}, "temperature", "0.7 with use_beam_search; set it to 0"),
        ({"stream": True}, "stream", "known only at the end; set it to false"),
        ({"top_p": 0.9}, "top_p", "set it to 1"),
        ({"top_k": 5}, "top_k", "set it to 0"),
        ({"frequency_penalty": 1}, "frequency_penalty", "set it to 0"),
        ({"stop": ["x"]}, "stop", "leave it out"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "leave it out"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "leave it out"),
        ({"n": 3, "best_of": 2}, "best_of", "from 3"),
        ({"n": 0}, "n", "from 1"),
        ({"best_of": 257}, "best_of", "to 256"),
        ({"length_penalty": 11}, "length_penalty", "to 10"),
        ({"early_stopping": "soon"}, "early_stopping", "soon"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty", "without use_beam_search"),
        ({"use_beam_search": None, "early_stopping": True}, "early_stopping", "without use_beam_search"),
        ({"use_beam_search": 1}, "use_beam_search", "true or false"),
    ],
)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_what_beam_search_cannot_do_is_named(
    server: Any, route: str, fields: dict[str, Any], param: str, says: str
) -> None:
    prompt = {"messages": USER} if route.startswith("chat") else {"prompt": "x"}
    reply = server.post(f"/v1/{route}", {**prompt, "use_beam_search": True, **fields})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param and says in error["message"], error


@pytest.mark.parametrize(
    ("route", "fields", "param", "says"),
    [
        ("completions", {"echo": True}, "echo", "set it to false"),
        ("completions", {"logprobs": 2}, "logprobs", "set it to 0"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 2}, "top_logprobs", "set it to 0"),
        ("chat/completions", {"use_beam_search": False, "best_of": 2}, "best_of", "use_beam_search"),
    ],
)
def test_what_one_route_cannot_do(server: Any, route: str, fields: dict[str, Any], param: str, says: str) -> None:
    test_what_beam_search_cannot_do_is_named(server, route, fields, param, says)


def test_fields_that_ask_for_nothing_are_taken(server: Any) -> None:
    neutral = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "stop": [], "early_stopping": "never"}
    reply = server.post("/v1/completions", {"prompt": "x", "use_beam_search": True, "max_tokens": 3, **neutral})
    assert reply.status_code == 200, reply.text
    plain = {"length_penalty": 1.0, "early_stopping": False, "use_beam_search": False, "max_tokens": 3}
    assert server.post("/v1/completions", {"prompt": "x", **plain}).status_code == 200


def test_a_search_begins_again_in_a_new_engine(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"use_beam_search": True, "best_of": 4, "ignore_eos": True}
    options: dict[str, Any] = {"model": "tiny", "prompt": "the sea", "n": 2, "max_tokens": 60, "extra_body": extra}
    expected = server.openai.completions.create(**options)
    program = deadly(monkeypatch, tmp_path / "lives", [Death(100)])
    with serving(server.service.model().path, program=program) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        reply = client.completions.create(**options)
        assert [choice.text for choice in reply.choices] == [choice.text for choice in expected.choices]
        assert reply.usage == expected.usage
        timeline = httpx.get(f"{url}/v1/requests/{reply.id}/timeline").json()
        assert "engine_died" in [event["event"] for event in timeline["events"]] and timeline["state"] == "finished"
