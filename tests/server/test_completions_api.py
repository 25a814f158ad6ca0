"""/v1/completions: forms of prompts, echo, logprobs, best_of."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.server


def complete(server: Any, prompt: Any, **options: Any) -> Any:
    return server.openai.completions.create(model="tiny", prompt=prompt, **options)


def test_all_forms_of_a_prompt(server: Any) -> None:
    ids = server.loaded.tokenizer.encode("the sea")
    alone = [complete(server, text, temperature=0, max_tokens=6).choices[0].text for text in ("the sea", "a bone")]
    assert complete(server, ids, temperature=0, max_tokens=6).choices[0].text == alone[0]
    for prompts in (["the sea", "a bone"], [ids, server.loaded.tokenizer.encode("a bone")]):
        reply = complete(server, prompts, temperature=0, max_tokens=6, n=2)
        assert [choice.text for choice in reply.choices] == [alone[0], alone[0], alone[1], alone[1]]
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]


def test_a_stream_of_several_prompts_is_the_whole_reply(server: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "seed": 4, "n": 2, "echo": True, "logprobs": 1}
    reply = complete(server, ["the sea", "or"], **options)
    texts = [""] * 4
    tokens: list[list[str]] = [[] for _ in range(4)]
    offsets: list[list[int]] = [[] for _ in range(4)]
    for chunk in complete(server, ["the sea", "or"], stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in reply.choices]
    assert tokens == [choice.logprobs.tokens for choice in reply.choices]
    assert offsets == [choice.logprobs.text_offset for choice in reply.choices]


def test_default_is_sixteen_tokens(server: Any) -> None:
    reply = complete(server, "the", extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 16 and reply.choices[0].finish_reason == "length"


def test_echo_scores_the_prompt(server: Any) -> None:
    """What evaluation harnesses ask for: no answer, the logprobs of the prompt."""
    reply = complete(server, "the sea", echo=True, max_tokens=0, logprobs=2)
    choice = reply.choices[0]
    assert choice.text == "the sea" and reply.usage.completion_tokens == 0
    assert "".join(choice.logprobs.tokens) == "the sea"
    assert choice.logprobs.token_logprobs[0] is None and all(p < 0 for p in choice.logprobs.token_logprobs[1:])
    assert [choice.text[at:][:1] for at in choice.logprobs.text_offset] == [t[0] for t in choice.logprobs.tokens]
    longer = complete(server, "the sea", echo=True, max_tokens=3, logprobs=2, temperature=0)
    assert longer.choices[0].logprobs.token_logprobs[:4] == choice.logprobs.token_logprobs
    assert len(longer.choices[0].logprobs.tokens) == 7


def test_best_of_keeps_the_most_likely(server: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "seed": 9, "temperature": 2.0, "logprobs": 0}
    options["extra_body"] = {"ignore_eos": True}
    all_samples = complete(server, "the", n=5, **options).choices
    best = max(all_samples, key=lambda choice: sum(choice.logprobs.token_logprobs))
    kept = complete(server, "the", n=1, best_of=5, **options)
    assert len(kept.choices) == 1 and kept.choices[0].text == best.text
    assert kept.usage.completion_tokens == 40


def test_sampling_fields_reach_the_engine(server: Any) -> None:
    forced = {"extra_body": {"min_tokens": 3, "stop_token_ids": [101]}, "logit_bias": {"101": 100}, "max_tokens": 9}
    reply = complete(server, "x", temperature=0, **forced)
    assert reply.usage.completion_tokens == 4 and reply.choices[0].finish_reason == "stop"
    banned = {"extra_body": {"bad_words": ["e"]}, "logit_bias": {"101": 50}, "logprobs": 0}
    assert "e" not in complete(server, "x", temperature=0, max_tokens=5, **banned).choices[0].logprobs.tokens
    narrow = {"extra_body": {"top_k": 1, "min_p": 0.5, "typical_p": 0.9, "repetition_penalty": 1.1, "repeat_last_n": 8}}
    once, twice = (complete(server, "x", max_tokens=6, seed=seed, **narrow).choices[0].text for seed in (1, 2))
    assert once == twice
