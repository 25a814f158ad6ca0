"""Request fields -> `SamplingParams`; what cannot be honoured is refused here, by name and with a remedy."""

from __future__ import annotations

from typing import Any

from pyinfer.errors import RequestError
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.server.schemas import ChatCompletionRequest, CompletionRequest, SamplingFields
from pyinfer.server.service import ServedModel, Service

# fields with the same name and meaning on both sides
_SHARED = (
    "n", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "repeat_last_n", "logit_bias", "seed", "stop", "stop_token_ids", "bad_words",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "max_tokens", "prompt_logprobs", "skip_special_tokens",
    "priority",
)  # fmt: skip

_TOOLS = "tool calls are not supported; describe the tool in a message, and leave this field out"
_REFUSED_IN_CHAT = {
    "reasoning_effort": 'models read it from their template; use chat_template_kwargs, like {"enable_thinking": false}',
    "verbosity": "it is not supported; ask for it in a message",
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "audio": "only text can be answered; leave it out",
    "prediction": "predicted outputs are not supported; leave it out",
    "moderation": "there is no moderation here; leave it out",
    "web_search_options": "there is no web search here; leave it out",
}


def chat_params(request: ChatCompletionRequest, model: ServedModel, service: Service) -> SamplingParams:
    """The model's chat defaults, overridden by what the request says."""
    fields = _shared(request, service)
    if (most := max_chat_tokens(request)) is not None:
        fields["max_tokens"] = most
    if request.best_of not in (None, request.n or 1):
        raise RequestError(
            f"best_of is {request.best_of}; in a chat it is for use_beam_search alone: ask for n answers and choose",
            param="best_of",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError(
            f"top_logprobs is {request.top_logprobs} without logprobs; set logprobs to true", param="top_logprobs"
        )
    if request.logprobs:
        fields["logprobs"] = _count("top_logprobs", request.top_logprobs or 0, service)
    return model.chat_defaults.replace(**fields)


def max_chat_tokens(request: ChatCompletionRequest) -> int | None:
    """`max_completion_tokens`, or its old name."""
    old, new = request.max_tokens, request.max_completion_tokens
    if new is not None and old not in (None, new):
        raise RequestError(
            f"max_tokens is {old} and max_completion_tokens is {new}; give one of them", param="max_tokens"
        )
    return old if new is None else new


def completion_params(request: CompletionRequest, service: Service) -> SamplingParams:
    """vLLM's defaults, overridden by what the request says."""
    if request.suffix:
        raise RequestError(
            f"suffix is {_short(request.suffix)}; filling in the middle is not supported: put the model's own "
            "fill-in-the-middle tokens into prompt",
            param="suffix",
        )
    fields = _shared(request, service)
    if request.logprobs is not None:
        fields["logprobs"] = _count("logprobs", request.logprobs, service)
    if request.best_of is not None:
        fields["best_of"] = request.best_of
        if request.stream and request.best_of > (request.n or 1):
            raise RequestError(
                f"best_of is {request.best_of} with stream: the best is known only at the end; set stream to false",
                param="best_of",
            )
    return SamplingParams.from_dict(fields)


def wants_usage(request: SamplingFields) -> bool:
    """Whether a stream ends with a chunk of token counts."""
    if request.stream_options is None:
        return False
    if not request.stream:
        raise RequestError("stream_options is set without stream; set stream to true", param="stream_options")
    return request.stream_options.include_usage


def _shared(request: SamplingFields, service: Service) -> dict[str, Any]:
    for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
        if (value := getattr(request, name)) not in (None, neutral):
            raise RequestError(
                f"{name} is {value!r} without use_beam_search; set that to true, or leave it out", param=name
            )
    fields = {name: value for name in _SHARED if (value := getattr(request, name)) is not None}
    if "prompt_logprobs" in fields:
        _count("prompt_logprobs", fields["prompt_logprobs"], service)
    return fields


def _count(name: str, value: int, service: Service) -> int:
    if not 0 <= value <= service.max_logprobs:
        raise RequestError(f"{name} is {value}; it must be from 0 to {service.max_logprobs}", param=name)
    return value


def refuse_in_chat(request: ChatCompletionRequest) -> None:
    """What OpenAI offers and we do not; comes before the rest."""
    for name, remedy in _REFUSED_IN_CHAT.items():
        value = getattr(request, name)
        if value is not None:
            raise RequestError(f"{name} is {_short(value)}; {remedy}", param=name, code="unsupported_parameter")
    if request.tools:
        raise RequestError(
            f"tools has {len(request.tools)} entries; {_TOOLS}", param="tools", code="unsupported_parameter"
        )
    refusals = (
        ("tool_choice", request.tool_choice, (None, "none", "auto"), _TOOLS),
        ("modalities", request.modalities, (None, ["text"]), "only text can be answered"),
        ("service_tier", request.service_tier, (None, "auto", "default"), 'there is one tier; use "auto"'),
        ("store", request.store, (None, False), "answers are not stored; use false"),
        (
            "response_format",
            request.response_format and request.response_format.type,
            (None, "text"),
            'only {"type": "text"} is supported',
        ),
    )
    for name, value, allowed, remedy in refusals:
        if value not in allowed:
            raise RequestError(f"{name} is {_short(value)}; {remedy}", param=name, code="unsupported_value")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
