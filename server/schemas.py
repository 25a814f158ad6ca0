"""What a request body may hold. Decoding is strict: an unknown field or a wrong type is a `RequestError` that names it.

Fields that label or route a request at OpenAI and say nothing about its answer are accepted without effect; options
that are not supported are declared too, so that their refusal (`parameters.py`) can say what to do instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Role = Literal["system", "developer", "user", "assistant", "tool"]


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message; only text can be used, the others are named in the refusal."""

    type: str
    text: str | None = None


class FunctionCall(_Strict, kw_only=True):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(_Strict, kw_only=True):
    id: str | None = None
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class ChatMessage(_Strict, kw_only=True):
    """A message as clients send it, and as they send back what they got (nulls included)."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class StreamOptions(_Strict, kw_only=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str


class SamplingFields(_Strict, kw_only=True):
    """Fields of `SamplingParams` that both completion endpoints take under the same name and meaning."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_last_n: int | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    # of beam search
    use_beam_search: bool | None = None
    best_of: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    # of the transport
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # no effect


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    # accepted as long as they ask for what happens anyway
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    store: bool | None = None
    # no effect
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # refused with a remedy
    reasoning_effort: str | None = None
    verbosity: str | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    moderation: Any = None
    web_search_options: Any = None


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None  # all entries of one kind
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class TokenizeRequest(_Strict, kw_only=True):
    """POST /tokenize, llama-server's form."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(_Strict, kw_only=True):
    """POST /detokenize, llama-server's form."""

    tokens: list[int]


class ApplyTemplateRequest(_Strict, kw_only=True):
    """POST /apply-template, llama-server's form."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    add_generation_prompt: bool = True
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None
