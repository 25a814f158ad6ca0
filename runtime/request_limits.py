"""`RequestLimits`: what a model can serve at all; checked where a request enters, before it is queued."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pyinfer.errors import RequestError
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.sampling_params import SamplingParams


class RequestLimits(msgspec.Struct, frozen=True):
    n_ctx: int  # longest sequence, prompt and answer together
    n_vocab: int
    takes_priority: bool = True  # False: the scheduling policy has no use for one

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """`RequestError` for a request that can never be served."""
        self._check_prompt(prompt)
        if len(prompt) >= self.n_ctx:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but the context of {self.n_ctx} takes at most {self.n_ctx - 1} "
                "and one to answer; shorten it or load the model with a larger context",
                param="prompt",
                code="context_length_exceeded",
            )
        if params.priority and not self.takes_priority:
            raise RequestError(
                f"priority is {params.priority}, but requests are not served by priority here; leave it out or use "
                "--scheduling-policy priority",
                param="priority",
            )
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and count > self.n_vocab:
                raise RequestError(f"{name} is {count}; the vocabulary has {self.n_vocab} tokens", param=name)

    def check_beam_search(self, prompt: list[int], params: BeamSearchParams) -> None:
        """`RequestError` for a search that can never be done."""
        self.check(prompt, params.sampling)
        if params.beam_width > self.n_vocab:  # else there are that many texts at every length
            raise RequestError(
                f"beam_width is {params.beam_width}; it must be at most the vocabulary's size of {self.n_vocab}",
                param="beam_width",
            )

    def check_scoring(self, token_ids: list[int]) -> None:
        """`RequestError` for ids whose logits can never be computed."""
        self._check_prompt(token_ids)
        if len(token_ids) > self.n_ctx:
            raise RequestError(
                f"{len(token_ids)} tokens are over the context of {self.n_ctx}; give fewer or load the model with a "
                "larger context",
                param="prompt",
                code="context_length_exceeded",
            )

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self.n_vocab:
            self._check_ids("prompt", prompt)

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self.n_vocab:
                raise RequestError(f"{name} has the token id {token}; ids go from 0 to {self.n_vocab - 1}", param=name)
