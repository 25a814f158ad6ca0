"""Beam search over HTTP: vLLM's fields `use_beam_search`, `best_of`, `length_penalty` and `early_stopping`.

The width is `best_of`, or `n`; the reply's choices are the best `n` texts. What only sampling can honour is refused.
"""

from __future__ import annotations

from typing import Any

from pyinfer.errors import RequestError
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.server.parameters import max_chat_tokens
from pyinfer.server.schemas import ChatCompletionRequest, CompletionRequest, SamplingFields
from pyinfer.server.service import ServedModel

# values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "typical_p": (1,), "repetition_penalty": (1,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "stop": ([],), "stop_token_ids": ([],),
    "bad_words": ([],), "min_tokens": (0,), "prompt_logprobs": (),
}  # fmt: skip


def chat_beams(request: ChatCompletionRequest, model: ServedModel) -> tuple[BeamSearchParams, SamplingParams] | None:
    """The search, and how its texts are to be shown; None if none is asked for."""
    if not request.use_beam_search:
        return None
    _check(request)
    if request.top_logprobs:
        raise _refusal("top_logprobs", request.top_logprobs, "only the texts' own logprobs are kept; set it to 0")
    most = max_chat_tokens(request)
    return _params(request, model.n_ctx if most is None else most, 0 if request.logprobs else None)


def completion_beams(request: CompletionRequest) -> tuple[BeamSearchParams, SamplingParams] | None:
    """The same for text completions."""
    if not request.use_beam_search:
        return None
    _check(request)
    if request.echo:
        raise _refusal("echo", True, "set it to false")
    if request.logprobs:
        raise _refusal("logprobs", request.logprobs, "only the texts' own are kept; set it to 0")
    most = SamplingParams().max_tokens if request.max_tokens is None else request.max_tokens
    return _params(request, most or 0, request.logprobs)


def _check(request: SamplingFields) -> None:
    if request.stream:
        raise _refusal("stream", True, "the texts are known only at the end; set it to false")
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            remedy = f"set it to {neutral[0]!r}, or leave it out" if neutral else "leave it out"
            raise _refusal(name, value, remedy)


def _params(request: SamplingFields, max_tokens: int, logprobs: int | None) -> tuple[BeamSearchParams, SamplingParams]:
    n = 1 if request.n is None else request.n
    skip_special = True if request.skip_special_tokens is None else request.skip_special_tokens
    shown = SamplingParams(
        n=n,
        best_of=request.best_of,
        logprobs=logprobs,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=skip_special,
    )
    beams = BeamSearchParams(
        beam_width=shown.n_samples,
        max_tokens=max_tokens,
        ignore_eos=bool(request.ignore_eos),
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        early_stopping=request.early_stopping is True,
        include_stop_str_in_output=shown.include_stop_str_in_output,
        priority=request.priority or 0,
    )
    return beams, shown.replace(best_of=None)


def _refusal(name: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"{name} is {value!r} with use_beam_search; {remedy}", param=name)
