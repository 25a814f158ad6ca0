"""/v1/chat/completions through OpenAI's own client, streaming and not."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.server

MESSAGES: list[Any] = [{"role": "user", "content": "the sea is"}]


def streamed(server: Any, **options: Any) -> tuple[list[str], list[str | None], list[Any]]:
    """Texts and finish reasons by choice, and the chunks."""
    chunks = list(server.openai.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **options))
    n = options.get("n", 1)
    texts = [""] * n
    reasons: list[str | None] = [None] * n
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return texts, reasons, chunks


def whole(server: Any, **options: Any) -> Any:
    return server.openai.chat.completions.create(model="tiny", messages=MESSAGES, **options)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7}, {"seed": 3, "n": 3, "temperature": 1.5}])
def test_a_stream_is_the_whole_reply_in_pieces(server: Any, options: dict[str, Any]) -> None:
    reply = whole(server, max_tokens=24, **options)
    texts, reasons, chunks = streamed(server, max_tokens=24, stream_options={"include_usage": True}, **options)
    assert texts == [choice.message.content for choice in reply.choices]
    assert reasons == [choice.finish_reason for choice in reply.choices]
    assert any(texts)
    usage = chunks[-1].usage
    assert not chunks[-1].choices and all(chunk.usage is None for chunk in chunks[:-1])
    assert usage.completion_tokens == reply.usage.completion_tokens
    assert usage.prompt_tokens == reply.usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_first_chunk_has_the_role_and_the_last_the_reason(server: Any) -> None:
    _, _, chunks = streamed(server, max_tokens=4, seed=1, extra_body={"ignore_eos": True})
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert last.finish_reason == "length" and last.delta.content is None
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


def test_events_are_framed_as_server_sent_events(server: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 3}
    reply = server.post("/v1/chat/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])


def test_same_tokens_as_the_engine_gives_directly(server: Any) -> None:
    """The edge adds nothing: prompt by the model's template, text by its tokenizer."""
    tokenizer = server.loaded.tokenizer
    prompt = "<|im_start|>user\nthe sea is<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
    reply = whole(server, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)
    assert reply.usage.prompt_tokens == len(ids)
    same = server.post("/v1/completions", {"prompt": ids, "max_tokens": 12, "temperature": 0, "logprobs": 0}).json()
    assert same["choices"][0]["text"] == reply.choices[0].message.content
    content = reply.choices[0].logprobs.content
    assert [entry.token for entry in content] == same["choices"][0]["logprobs"]["tokens"]
    for entry in content:
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token or entry.token.startswith("bytes:")
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True) and entry.logprob == tops[0]


@pytest.mark.parametrize("seed", range(6))
def test_stop_string_cuts_exactly_and_never_leaks(server: Any, seed: int) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "seed": seed, "extra_body": {"ignore_eos": True}}
    full = whole(server, **options)
    text = full.choices[0].message.content
    at = len(text) // 2
    stop = text[at : at + 3]
    expected = text[: text.index(stop)]
    reply = whole(server, stop=[stop, "never in this text"], **options)
    assert reply.choices[0].message.content == expected and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < full.usage.completion_tokens
    texts, reasons, chunks = streamed(server, stop=stop, **options)
    assert (texts, reasons) == ([expected], ["stop"])
    shown = ""
    for chunk in chunks:
        shown += chunk.choices[0].delta.content or ""
        assert expected.startswith(shown)
    options["extra_body"]["include_stop_str_in_output"] = True
    assert whole(server, stop=stop, **options).choices[0].message.content == expected + stop
    server.wait_idle()


def test_cached_tokens_are_reported(server: Any) -> None:
    messages = [{"role": "user", "content": "a prompt of more than one page of sixteen tokens, seen twice"}]
    for _ in range(2):
        reply = server.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert reply.usage.prompt_tokens_details.cached_tokens >= 16


def test_user_text_cannot_write_control_tokens(server: Any) -> None:
    def n_tokens(text: str) -> int:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        return int(server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"])

    # as one control token it would be 9 tokens fewer than its 10 letters
    assert n_tokens("x<|im_end|>") - n_tokens("x") > 5


def test_parts_and_returned_messages_are_accepted(server: Any) -> None:
    answer = whole(server, max_tokens=2).choices[0].message.model_dump()
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "x", "name": "someone"},
        answer,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]  # fmt: skip
    body = {"model": "tiny", "messages": messages, "max_tokens": 2}
    assert server.post("/v1/chat/completions", body).status_code == 200
    text = server.post("/apply-template", {"messages": messages}).json()["prompt"]
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n") and text.endswith("<|im_start|>assistant\n")


def test_fields_without_effect_are_accepted(server: Any) -> None:
    plain = whole(server, max_tokens=6, seed=5).choices[0].message.content
    reply = whole(
        server, max_completion_tokens=6, seed=5, user="u", metadata={"a": "b"}, store=False, service_tier="auto",
        parallel_tool_calls=True, response_format={"type": "text"}, modalities=["text"], tool_choice="none", tools=[],
    )  # fmt: skip
    assert reply.choices[0].message.content == plain


def test_prompt_logprobs_come_in_vllms_form(server: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 2}
    entries = server.post("/v1/chat/completions", body).json()["prompt_logprobs"]
    assert entries[0] is None and all({"logprob", "rank", "decoded_token"} == set(v) for v in entries[1].values())


def test_models_and_version(server: Any) -> None:
    assert [model.id for model in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert set(httpx.get(f"{server.url}/version").json()) == {"version"}
    assert httpx.get(f"{server.url}/props").json()["default_generation_settings"]["n_ctx"] == 512
    page = httpx.get(server.url)
    assert page.status_code == 200 and "http" not in page.text.split("<body", 1)[1].replace("http-equiv", "")


def test_tokenize_and_back(server: Any) -> None:
    tokens = server.post("/tokenize", {"content": "the sea <|im_end|>", "with_pieces": True}).json()["tokens"]
    assert tokens[-1] == {"id": 299, "piece": "<|im_end|>"}
    ids = [token["id"] for token in tokens]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": "the sea <|im_end|>"}
    split = server.post("/tokenize", {"content": "<|im_end|>", "parse_special": False}).json()["tokens"]
    assert len(split) > 1
