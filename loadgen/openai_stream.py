"""One streamed completion: the request's body, and what its stream tells, with the time of every chunk."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from pyinfer.loadgen.http_client import HttpClient, StatusError
from pyinfer.loadgen.http_reader import HttpError

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class LoadRequest:
    """What is sent: a prompt as text or token ids, and how many tokens are wanted."""

    prompt: str | list[int]
    n_prompt: int  # tokens, as far as they are known before the server counts them
    n_output: int  # max_tokens


@dataclass
class RequestRecord:
    """What came of a request. Times are `time.perf_counter()`; a chunk counts if it carries text."""

    n_prompt: int
    n_output: int = 0  # tokens; what the server counts, or else 0 until someone counts `text`
    start: float = 0.0  # before the connection was opened
    end: float = 0.0  # the last chunk, or the failure
    chunk_times: list[float] = field(default_factory=list)
    text: str = ""
    n_cached: int = 0  # prompt tokens that the server had in a cache, if it says so
    error: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.error is None


@dataclass(frozen=True)
class SendOptions:
    """What all requests of a run have in common."""

    model: str
    endpoint: Endpoint = "completions"
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout: float = 600.0  # seconds for a whole request
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def body(self, request: LoadRequest) -> bytes:
        """The request's JSON."""
        fields: dict[str, Any] = {"model": self.model, "max_tokens": request.n_output, "temperature": self.temperature}
        if self.endpoint == "chat":
            assert isinstance(request.prompt, str)
            fields["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            fields["prompt"] = request.prompt
        if self.ignore_eos:
            fields["ignore_eos"] = True
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({**fields, **self.extra_body}).encode()


async def send(client: HttpClient, request: LoadRequest, options: SendOptions, record: RequestRecord) -> None:
    """Send a request and fill `record`; what goes wrong becomes `record.error`. If cancelled, what came is kept."""
    stream = _Stream(record)
    body = options.body(request)
    record.start = time.perf_counter()
    try:
        async with asyncio.timeout(options.timeout):
            await client.stream(PATHS[options.endpoint], body, stream.on_event)
        if not stream.is_finished:
            record.error = "the stream ended without a finish reason or [DONE]"
        elif not record.end:
            record.error = "the stream holds no chunk of an answer"
        elif not record.chunk_times:  # all of its tokens are special, or no whole character
            record.chunk_times.append(record.end)
    except TimeoutError:
        record.error = f"no complete answer within {options.timeout:g} s"
    except (StatusError, HttpError) as error:
        record.error = str(error)
    except OSError as error:
        record.error = f"{client.base_url}: {error.strerror or error}"
    finally:
        record.text = "".join(stream.texts)
        if record.error is not None:
            record.end = time.perf_counter()


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class _Stream:
    """Reads the events of one answer into a record."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.texts: list[str] = []
        self.is_finished = False

    def on_event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.is_finished = True
            return
        try:
            event = _decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise HttpError(f"an event is no completion chunk: {error}") from error
        if event.error is not None:
            raise HttpError(f"the server gave up: {json.dumps(event.error)[:300]}")
        record = self.record
        for choice in event.choices or ():
            text = choice.text
            if text is None and choice.delta is not None:
                text = choice.delta.content or choice.delta.reasoning_content or choice.delta.reasoning
            if text:
                self.texts.append(text)
                record.chunk_times.append(now)
            if choice.finish_reason is not None:
                self.is_finished = True
            record.end = now
        if event.usage is not None:
            self._take_usage(event.usage)

    def _take_usage(self, usage: _Usage) -> None:
        record = self.record
        record.n_prompt = usage.prompt_tokens or record.n_prompt
        record.n_output = usage.completion_tokens or record.n_output
        if usage.prompt_tokens_details is not None:
            record.n_cached = usage.prompt_tokens_details.cached_tokens or 0
