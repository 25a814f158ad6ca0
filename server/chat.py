"""POST /v1/chat/completions and /apply-template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from pyinfer.errors import RequestError
from pyinfer.runtime.chat_prompt import chat_prompt
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.server.beams import chat_beams
from pyinfer.server.decoding import read_request
from pyinfer.server.errors import json_response
from pyinfer.server.generation import Delta, Generation
from pyinfer.server.logprobs import chat_logprobs, prompt_logprobs_json
from pyinfer.server.parameters import chat_params, refuse_in_chat, wants_usage
from pyinfer.server.reply import Reply, service_of
from pyinfer.server.schemas import ApplyTemplateRequest, ChatCompletionRequest, ChatMessage
from pyinfer.server.service import ServedModel
from pyinfer.server.sse import EventStream, while_connected

# what a template gets from elsewhere, and the names of our own parameters
_TEMPLATE_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "template",
        "tokenizer",
        "self",
    }
)
router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    service = service_of(request)
    model = service.model()
    body = await read_request(request, ChatCompletionRequest)
    name = service.check_name(body.model)
    refuse_in_chat(body)
    beams, params = chat_beams(body, model) or (None, chat_params(body, model, service))
    include_usage = wants_usage(body)
    prompt = await asyncio.to_thread(_prompt_ids, model, body)
    reply = Reply("chatcmpl", name, "chat.completion.chunk", include_usage)
    try:
        generation = Generation(model, [prompt], params, reply.id, beams)
    except RequestError as error:
        if error.param == "prompt":
            error.param = "messages"  # what the client wrote it as
        raise
    if body.stream:
        return EventStream(_events(model, params, generation, reply))
    answer = await while_connected(request.receive, _whole(model, params, generation, reply))
    return json_response(msgspec.json.encode(answer))


@router.post("/apply-template")
async def apply_template(request: Request) -> Response:
    service = service_of(request)
    template = service.model().template
    body = await read_request(request, ApplyTemplateRequest)
    service.check_name(body.model)
    text = await asyncio.to_thread(
        template.render,
        messages_of(body.messages, template.knows_developer),
        tools=body.tools,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        **_template_kwargs(body),
    )
    return json_response(msgspec.json.encode({"prompt": text}))


def messages_of(messages: list[ChatMessage], knows_developer: bool) -> list[dict[str, Any]]:
    """Messages as templates take them: fields that were not given are left out, `developer` is `system` to most."""
    result: list[dict[str, Any]] = []
    for message in messages:
        fields = msgspec.to_builtins(message)
        fields.setdefault("content", None)
        if message.role == "developer" and not knows_developer:
            fields["role"] = "system"
        result.append(fields)
    return result


def _template_kwargs(body: ChatCompletionRequest | ApplyTemplateRequest) -> dict[str, Any]:
    kwargs = body.chat_template_kwargs or {}
    taken = sorted(_TEMPLATE_NAMES & kwargs.keys())
    if taken:
        raise RequestError(
            f"chat_template_kwargs has {taken[0]!r}, which the server sets itself; leave it out",
            param=f"chat_template_kwargs.{taken[0]}",
        )
    return kwargs


def _prompt_ids(model: ServedModel, body: ChatCompletionRequest) -> list[int]:
    return chat_prompt(
        model.template,
        model.tokenizer,
        messages_of(body.messages, model.template.knows_developer),
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        **_template_kwargs(body),
    )


async def _events(
    model: ServedModel, params: SamplingParams, generation: Generation, reply: Reply
) -> AsyncGenerator[bytes]:
    """Whole events, together those of what came together."""
    async with aclosing(generation.deltas()) as parts:
        async for deltas in parts:
            events: list[bytes] = []
            for delta in deltas:
                if delta.is_first:
                    events.append(_first_event(model, delta, reply))
                logprobs = None
                if delta.logprobs is not None and params.logprobs is not None:
                    logprobs = chat_logprobs(model.tokenizer, delta, params.logprobs)
                if delta.text or logprobs is not None:
                    events.append(reply.event(_choice(delta.index, {"content": delta.text}, None, logprobs)))
                if delta.finish_reason is not None:
                    events.append(reply.event(_choice(delta.index, {}, delta.finish_reason)))
            if events:
                yield b"".join(events)
    if reply.include_usage:
        yield reply.usage_event(generation.usage)


def _choice(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _first_event(model: ServedModel, delta: Delta, reply: Reply) -> bytes:
    choice = _choice(delta.index, {"role": "assistant", "content": ""})
    if delta.prompt_logprobs is None:
        return reply.event(choice)
    return reply.event_beside(choice, prompt_logprobs=prompt_logprobs_json(model.tokenizer, delta.prompt_logprobs))


async def _whole(model: ServedModel, params: SamplingParams, generation: Generation, reply: Reply) -> dict[str, Any]:
    texts, reasons = [""] * params.n_samples, [""] * params.n_samples
    tokens: list[list[dict[str, Any]]] = [[] for _ in texts]
    prompt_logprobs = None
    async with aclosing(generation.deltas()) as parts:
        async for delta in (delta async for deltas in parts for delta in deltas):
            texts[delta.index] += delta.text
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
            if delta.logprobs is not None and params.logprobs is not None:
                tokens[delta.index] += chat_logprobs(model.tokenizer, delta, params.logprobs)["content"]
            prompt_logprobs = delta.prompt_logprobs or prompt_logprobs
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": {"content": tokens[index], "refusal": None} if params.logprobs is not None else None,
            "finish_reason": reasons[index],
        }
        for index, text in enumerate(texts)
    ]
    answer = reply.whole("chat.completion", choices, generation.usage)
    if prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs_json(model.tokenizer, prompt_logprobs)
    return answer
