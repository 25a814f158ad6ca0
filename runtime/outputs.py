"""What comes out of the engine and what `LLM` returns.

Everything here is a plain message (`msgspec.Struct`): it can cross a process boundary as it is. The engine speaks in
ids; text (`decoded_token`, `text`) is filled in at the edge.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort"]


class Logprob(msgspec.Struct):
    """Log-probability of one token, raw: before temperature, penalties and masks."""

    logprob: float
    rank: int  # 1 is the most likely token of the vocabulary
    decoded_token: str | None = None  # None until the edge fills it in


# the chosen (or given) token first, then the most likely ones in descending order
TokenLogprobs = dict[int, Logprob]


class RequestMetrics(msgspec.Struct):
    """Times of one request in seconds of `time.monotonic`; 0.0 is "not yet"."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    preemptions: int = 0


class RequestFailure(msgspec.Struct, frozen=True):
    """Why a request ended without a finish reason: the fields of a `PyinferError`."""

    message: str
    error_type: str
    http_status: int
    retry_after: int | None = None  # seconds until the same request would be taken


class RequestOutput(msgspec.Struct):
    """One chunk: what one step added to one sample of a request."""

    request_id: str
    index: int = 0  # which of the `n` samples
    new_token_ids: list[int] = []
    new_logprobs: list[TokenLogprobs] | None = None  # one a new token, if asked for
    finish_reason: FinishReason | None = None  # set on a sample's last chunk
    stop_token: int | None = None  # the token that ended the sample, if one did
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first chunk of sample 0; first entry None
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    metrics: RequestMetrics | None = None  # with a sample's last chunk
    cumulative_logprob: float | None = None  # of a whole beam
    failure: RequestFailure | None = None  # the request died; the last chunk of the whole request


class CompletionOutput(msgspec.Struct):
    """One finished sample, as text."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None  # the stop token id or stop string; None for the model's own end or a length


class GenerationOutput(msgspec.Struct):
    """What `LLM.generate` and `LLM.chat` return for one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
    metrics: RequestMetrics | None
    num_cached_tokens: int = 0
    finished: bool = True


class BeamSearchSequence(msgspec.Struct):
    """One text that beam search found."""

    tokens: list[int]  # prompt and output
    logprobs: list[TokenLogprobs]  # of the output's tokens and of the end token, kept or not
    cum_logprob: float
    text: str  # of all tokens
    finish_reason: FinishReason | None
    stop_reason: int | None = None  # the end token


class BeamSearchOutput(msgspec.Struct):
    """What `LLM.beam_search` returns for one prompt: at most `beam_width` texts, best first."""

    sequences: list[BeamSearchSequence]


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot of the engine; the counters only grow."""

    running: int
    waiting: int
    pages_total: int
    pages_used: int  # held by a request
    pages_cached: int  # held by nobody, kept for prefix reuse
    kv_usage: float  # pages_used / pages_total
    prefix_queries: int  # prompt tokens looked up
    prefix_hits: int  # of those, found
    preemptions: int
    prompt_tokens: int  # run through the model as prompt or recomputed
    generation_tokens: int
    requests_finished: int
    steps: int
    swaps: int = 0  # of the preemptions, those that kept the pages in host memory
    refusals: int = 0  # requests that would have waited longer than allowed


FloatMatrix = npt.NDArray[np.float32]
