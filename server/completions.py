"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from pyinfer.errors import RequestError
from pyinfer.runtime.outputs import TokenLogprobs
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.server.beams import completion_beams
from pyinfer.server.decoding import read_request
from pyinfer.server.errors import json_response
from pyinfer.server.generation import Delta, Generation, Usage
from pyinfer.server.logprobs import CompletionLogprobs, prompt_logprobs_json
from pyinfer.server.parameters import completion_params, wants_usage
from pyinfer.server.reply import Reply, service_of
from pyinfer.server.schemas import CompletionRequest
from pyinfer.server.service import ServedModel
from pyinfer.server.sse import EventStream, while_connected

MAX_SAMPLES = 1024  # of all prompts of a request together
_OBJECT = "text_completion"
router = APIRouter()


@dataclass(frozen=True)
class _Form:
    """How a reply is to look."""

    params: SamplingParams  # as the client asked
    prompts: list[list[int]]
    echo: list[str] | None  # the prompts' texts, where they precede the answers
    answer: bool = True  # False: `max_tokens` is 0, only the prompts are scored

    def usage(self, generation: Generation) -> Usage:
        if not self.answer:
            generation.usage.completion_tokens = 0
        return generation.usage


class _Choice:
    """Turns the deltas of one choice into the reply's fields; the echo comes with the first."""

    def __init__(self, form: _Form, number: int, model: ServedModel) -> None:
        self.score = 0.0  # cumulative logprob, by which `best_of` chooses
        self._form = form
        self._number = number  # of the prompt
        self._model = model
        params = form.params
        self._is_ranked = params.n_samples > params.n
        self._logprobs = (
            None
            if params.logprobs is None
            else CompletionLogprobs(model.tokenizer, params.logprobs, params.skip_special_tokens)
        )

    def fields(self, delta: Delta, prompt_logprobs: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        """`index`, `text`, `logprobs`, `finish_reason`, and `prompt_logprobs` if asked for."""
        form = self._form
        if self._is_ranked:
            for token, entries in zip(delta.token_ids, delta.logprobs or [], strict=True):
                self.score += entries[token].logprob
        text, tokens = delta.text, delta.token_ids
        logprobs: Sequence[TokenLogprobs | None] = delta.logprobs or []
        if not form.answer:
            text, tokens, logprobs = "", [], []
        if delta.is_first and form.echo is not None:
            text = form.echo[self._number] + text
            tokens = form.prompts[self._number] + tokens
            logprobs = [*(prompt_logprobs or []), *logprobs]
        result: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": None if self._logprobs is None else self._logprobs.part(tokens, logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.is_first and form.params.prompt_logprobs is not None and prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs_json(self._model.tokenizer, prompt_logprobs)
        return result


class _Choices:
    """All choices of a reply."""

    def __init__(self, model: ServedModel, form: _Form, n_choices: int) -> None:
        self._n_samples = form.params.n_samples
        self._choices = [_Choice(form, index // self._n_samples, model) for index in range(n_choices)]
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by prompt

    def fields(self, delta: Delta) -> dict[str, Any]:
        """What a delta adds to its choice."""
        number = delta.index // self._n_samples
        if delta.prompt_logprobs is not None:  # comes with sample 0, which runs ahead of the others
            self._prompt_logprobs[number] = delta.prompt_logprobs
        return self._choices[delta.index].fields(delta, self._prompt_logprobs.get(number))

    def score(self, index: int) -> float:
        return self._choices[index].score


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    service = service_of(request)
    model = service.model()
    body = await read_request(request, CompletionRequest)
    name = service.check_name(body.model)
    found = completion_beams(body)
    scores_only = body.max_tokens == 0 and bool(body.echo)
    if scores_only:
        body.max_tokens = 1  # the engine's one token is left out of the reply
    beams, params = found or (None, completion_params(body, service))
    asked = params
    if body.echo and params.logprobs is not None:
        params = params.replace(prompt_logprobs=max(params.logprobs, params.prompt_logprobs or 0))
    if params.needs_logprobs and params.logprobs is None:
        params = params.replace(logprobs=0)  # best_of ranks by them
    include_usage = wants_usage(body)
    prompts = await asyncio.to_thread(_prompts, body.prompt, model)
    n_samples = params.n_samples if beams is None else beams.beam_width
    if len(prompts) * n_samples > MAX_SAMPLES:
        raise RequestError(
            f"prompt has {len(prompts)} entries of {n_samples} samples; at most {MAX_SAMPLES} samples fit into "
            "a request: send several",
            param="prompt",
        )
    reply = Reply("cmpl", name, _OBJECT, include_usage)
    generation = Generation(model, prompts, params, reply.id, beams)
    form = _Form(asked, prompts, _texts(body, prompts, model) if body.echo else None, answer=not scores_only)
    if body.stream:
        return EventStream(_events(model, form, generation, reply))
    answer = await while_connected(request.receive, _whole(model, form, generation, reply))
    return json_response(msgspec.json.encode(answer))


def _prompts(prompt: str | list[str | int | list[int]] | None, model: ServedModel) -> list[list[int]]:
    """Token ids of each prompt; text is encoded with the model's BOS."""
    if prompt is None:
        raise RequestError("prompt is missing; give a string, a list of strings, or token ids", param="prompt")
    tokenizer = model.tokenizer
    entries: list[str | list[int]] = [prompt] if isinstance(prompt, str) else []
    if isinstance(prompt, list):
        token_ids = [entry for entry in prompt if isinstance(entry, int)]
        entries = [token_ids] if token_ids else [entry for entry in prompt if not isinstance(entry, int)]
        if len({type(entry) for entry in prompt}) > 1:
            raise RequestError("prompt mixes strings, token ids and lists; use one kind", param="prompt")
    if not entries or not all(entries):
        raise RequestError("prompt is empty; give at least one character or token", param="prompt")
    return [tokenizer.encode(entry) if isinstance(entry, str) else entry for entry in entries]


def _texts(body: CompletionRequest, prompts: list[list[int]], model: ServedModel) -> list[str]:
    """What `echo` shows: text as it was given, token ids decoded."""
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt or []
    texts = [entry for entry in given if isinstance(entry, str)]
    return texts or [model.tokenizer.decode(ids, skip_special=False) for ids in prompts]


async def _events(model: ServedModel, form: _Form, generation: Generation, reply: Reply) -> AsyncGenerator[bytes]:
    """Whole events, together those of what came together."""
    choices = _Choices(model, form, generation.n_choices)
    async with aclosing(generation.deltas()) as parts:
        async for deltas in parts:
            events: list[bytes] = []
            for delta in deltas:
                fields = choices.fields(delta)
                if fields["text"] or fields["logprobs"] is not None or fields["finish_reason"] is not None:
                    events.append(reply.event(fields))
            if events:
                yield b"".join(events)
    if reply.include_usage:
        yield reply.usage_event(form.usage(generation))


async def _whole(model: ServedModel, form: _Form, generation: Generation, reply: Reply) -> dict[str, Any]:
    choices = _Choices(model, form, generation.n_choices)
    bodies: list[dict[str, Any]] = [{} for _ in range(generation.n_choices)]
    async with aclosing(generation.deltas()) as parts:
        async for delta in (delta async for deltas in parts for delta in deltas):
            _append(bodies[delta.index], choices.fields(delta))
    n, samples = form.params.n, form.params.n_samples
    kept: list[dict[str, Any]] = []
    for start in range(0, len(bodies), samples):
        ranked = sorted(range(start, start + samples), key=choices.score, reverse=True)
        kept += [bodies[i] for i in (ranked[:n] if samples > n else range(start, start + samples))]
    return reply.whole(_OBJECT, [{**body, "index": i} for i, body in enumerate(kept)], form.usage(generation))


def _append(body: dict[str, Any], fields: dict[str, Any]) -> None:
    """Fold a part into a choice of a whole reply."""
    if not body:
        body.update(fields)
        return
    body["text"] += fields["text"]
    body["finish_reason"] = fields["finish_reason"]
    if fields["logprobs"] is not None:
        for name, values in fields["logprobs"].items():
            if values is not None:
                body["logprobs"][name] += values
