"""Whatever is wrong with a request is named: field, value, remedy; in OpenAI's form."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import openai
import pytest

from pyinfer.errors import OverloadedError
from pyinfer.server.decoding import MAX_BODY
from pyinfer.server.service import Service

pytestmark = pytest.mark.server

USER = [{"role": "user", "content": "x"}]


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": USER, **fields}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "x", **fields}


BAD: list[tuple[tuple[str, dict[str, Any]], str | None, str]] = [
    (chat(temprature=1), "temprature", "did you mean 'temperature'"),
    (chat(nonsense=1), "nonsense", "not a field"),
    (chat(temperature="hot"), "temperature", 'is "hot"; it must be a number'),
    (chat(temperature=-1), "temperature", "is -1"),
    (chat(temperature=True), "temperature", "is true"),
    (chat(top_p=0), "top_p", "0 (not included)"),
    (chat(n=0), "n", "from 1"),
    (chat(n=1.5), "n", "is 1.5; it must be an integer"),
    (chat(stream="yes"), "stream", "true or false"),
    (chat(stop=[""]), "stop", "none of them empty"),
    (chat(seed="x"), "seed", "an integer"),
    (chat(logit_bias={"a": 1}), "logit_bias", "token ids"),
    (chat(logit_bias={"300": 1}), "logit_bias", "from 0 to 299"),
    (chat(stop_token_ids=[300]), "stop_token_ids", "from 0 to 299"),
    (chat(top_logprobs=2), "top_logprobs", "set logprobs to true"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
    (chat(max_tokens=0), "max_tokens", "is 0"),
    (chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "give one"),
    (chat(min_tokens=9, max_tokens=3), "min_tokens", "at most max_tokens"),
    (chat(stream_options={"include_usage": True}), "stream_options", "set stream"),
    (chat(tools=[{"type": "function"}]), "tools", "not supported"),
    (chat(tool_choice="required"), "tool_choice", "not supported"),
    (chat(functions=[]), "functions", "not supported"),
    (chat(response_format={"type": "json_object"}), "response_format", "only"),
    (chat(store=True), "store", "use false"),
    (chat(modalities=["audio"]), "modalities", "only text"),
    (chat(reasoning_effort="low"), "reasoning_effort", "chat_template_kwargs"),
    (chat(chat_template_kwargs={"tools": []}), "chat_template_kwargs.tools", "leave it out"),
    (chat(messages=[]), "messages", "at least one"),
    (chat(messages=[{"role": "usr", "content": "x"}]), "messages[0].role", "one of system"),
    (chat(messages=[{"role": "user", "content": "x", "foo": 1}]), "messages[0].foo", "not a field"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]", "text parts"),
    (chat(messages=[{"content": "x"}]), "messages[0].role", "is missing"),
    (("/v1/chat/completions", {}), "messages", "is missing"),
    (chat(messages=[{"role": "user", "content": "x" * 2000}]), "messages", "the context of 512"),
    (text(suffix="y"), "suffix", "not supported"),
    (text(logprobs=21), "logprobs", "from 0 to 20"),
    (text(best_of=2, stream=True), "best_of", "set stream to false"),
    (text(best_of=1, n=2), "best_of", "it must be"),
    (text(max_tokens=0), "max_tokens", "is 0"),
    (text(prompt=[]), "prompt", "is empty"),
    (text(prompt=""), "prompt", "is empty"),
    (text(prompt=[1, "a"]), "prompt", "mixes"),
    (text(prompt=[1, 300]), "prompt", "300"),
    (text(prompt=["a", [400]]), "prompt", "mixes"),
    (text(prompt=["a"] * 2000), "prompt", "1024"),
    (text(prompt_logprobs=99), "prompt_logprobs", "from 0 to 20"),
    (("/v1/completions", {}), "prompt", "is missing"),
    (("/tokenize", {}), "content", "is missing"),
    (("/tokenize", {"content": 5}), "content", "a string"),
    (("/detokenize", {"tokens": [999]}), None, "999"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "param", "part"), BAD, ids=[f"{i}-{case[1]}" for i, case in enumerate(BAD)])
def test_bad_request_names_the_field(server: Any, request_: Any, param: str | None, part: str) -> None:
    reply = server.post(*request_)
    error = reply.json()["error"]
    assert reply.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and part in error["message"], error
    assert "\n" not in error["message"]
    server.wait_idle()


def test_clients_see_their_own_exceptions(server: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here; use tiny"):
        server.openai.chat.completions.create(model="gpt-4", messages=USER)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.openai.chat.completions.create(model="tiny", messages=USER, temperature=-3, stream=True)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
    ],
)
def test_wrong_routes(server: Any, method: str, path: str, status: int, code: str) -> None:
    reply = httpx.request(method, server.url + path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_bodies_that_are_no_json_or_too_large(server: Any) -> None:
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, content=b'{"prompt": ').json()["error"]["code"] == "invalid_json"
    assert httpx.post(url, content=b'{"prompt": "\xff"}').status_code == 400
    assert httpx.post(url, content=b"[" * 100_000).status_code == 400
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("stream", [False, True])
def test_who_would_wait_too_long_is_told_when_to_come_back(
    server: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def refuse(sequence: object) -> None:
        raise OverloadedError("this request would wait about 9 s", retry_after=7)

    monkeypatch.setattr(server.loaded.engine.admission, "check", refuse)
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": USER})):
        reply = server.post(path, {"model": "tiny", "stream": stream, **body})
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded") and "9 s" in error["message"]


def test_everything_waits_for_the_model(start_server: Any) -> None:
    url, stop = start_server(Service(["later"]))
    try:
        for reply in (httpx.get(f"{url}/health"), httpx.post(f"{url}/v1/chat/completions", json={"messages": USER})):
            assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
            assert reply.json()["error"]["code"] == "model_loading"
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "later"
    finally:
        stop()


def test_api_key_and_cors(start_server: Any) -> None:
    url, stop = start_server(Service(["x"]), api_key="secret", cors_origins=["http://page"])
    try:
        assert httpx.get(f"{url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        allowed = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret", "Origin": "http://page"})
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "http://page"
        assert httpx.get(f"{url}/health").status_code == 503
    finally:
        stop()
