"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
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
        self._logprobs = (
            None
            if params.logprobs is None
            else CompletionLogprobs(model.tokenizer, params.logprobs, params.skip_special_tokens)
        )

    def fields(self, delta: Delta, prompt_logprobs: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        """`text`, `logprobs`, `finish_reason`, and `prompt_logprobs` if asked for."""
        for token, entries in zip(delta.token_ids, delta.logprobs or [], strict=bool(delta.logprobs)):
            self.score += entries[token].logprob
        text, tokens, logprobs = "", list[int](), list[TokenLogprobs | None]()
        if delta.is_first and self._form.echo is not None:
            text = self._form.echo[self._number]
            tokens += self._form.prompts[self._number]
            logprobs += prompt_logprobs or []
        if self._form.answer:
            text += delta.text
            tokens += delta.token_ids
            logprobs += delta.logprobs or []
        result: dict[str, Any] = {
            "text": text,
            "logprobs": None if self._logprobs is None else self._logprobs.part(tokens, logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.is_first and self._form.params.prompt_logprobs is not None and prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs_json(self._model.tokenizer, prompt_logprobs)
        return result


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
    reply = Reply("cmpl", name, include_usage)
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


async def _fields(
    model: ServedModel, form: _Form, generation: Generation, choices: list[_Choice]
) -> AsyncGenerator[tuple[int, dict[str, Any]]]:
    """The fields of each delta, by choice."""
    samples = form.params.n_samples
    choices += [_Choice(form, index // samples, model) for index in range(generation.n_choices)]
    prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            number = delta.index // samples
            if delta.prompt_logprobs is not None:
                prompt_logprobs[number] = delta.prompt_logprobs  # comes with sample 0, which runs ahead of the others
            yield delta.index, choices[delta.index].fields(delta, prompt_logprobs.get(number))


async def _events(
    model: ServedModel, form: _Form, generation: Generation, reply: Reply
) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(_fields(model, form, generation, [])) as parts:
        async for index, fields in parts:
            if fields["text"] or fields["logprobs"] is not None or fields["finish_reason"] is not None:
                yield reply.chunk(_OBJECT, [{"index": index, **fields}])
    if reply.include_usage:
        yield reply.usage_chunk(_OBJECT, form.usage(generation))


async def _whole(model: ServedModel, form: _Form, generation: Generation, reply: Reply) -> dict[str, Any]:
    choices: list[_Choice] = []
    bodies: list[dict[str, Any]] = [{} for _ in range(generation.n_choices)]
    async with aclosing(_fields(model, form, generation, choices)) as parts:
        async for index, fields in parts:
            _append(bodies[index], fields)
    n, samples = form.params.n, form.params.n_samples
    kept: list[dict[str, Any]] = []
    for start in range(0, len(bodies), samples):
        ranked = sorted(range(start, start + samples), key=lambda i: choices[i].score, reverse=True)
        kept += [bodies[i] for i in (ranked[:n] if samples > n else range(start, start + samples))]
    return reply.whole(_OBJECT, [{"index": i, **body} for i, body in enumerate(kept)], form.usage(generation))


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
