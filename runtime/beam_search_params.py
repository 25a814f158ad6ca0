"""`BeamSearchParams`: how one beam search goes. vLLM's names, meanings and defaults."""

from __future__ import annotations

import math

import msgspec

from pyinfer.errors import RequestError
from pyinfer.runtime.sampling_params import MAX_SAMPLES, SamplingParams


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Validated when built: a `RequestError` names the parameter, its value and the range."""

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False  # an end token is a token like any other
    temperature: float = 0.0  # logits are divided by it first; 0 leaves them as 1 does
    length_penalty: float = 1.0  # a text's score is its logprob / tokens ** length_penalty
    early_stopping: bool = False  # end with `beam_width` complete texts, even if better ones may still come
    include_stop_str_in_output: bool = False  # keep the end token
    priority: int = 0  # as in `SamplingParams`

    def __post_init__(self) -> None:
        for name, high in (("beam_width", MAX_SAMPLES), ("max_tokens", 2**31 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= high:
                raise RequestError(f"{name} is {value!r}; it must be an integer from 1 to {high}", param=name)
        for name, low in (("temperature", 0.0), ("length_penalty", -10.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= 10.0:
                raise RequestError(f"{name} is {value!r}; it must be a number from {low:g} to 10", param=name)

    @property
    def sampling(self) -> SamplingParams:
        """What a request needs besides."""
        return SamplingParams(
            n=self.beam_width,
            temperature=0.0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            priority=self.priority,
        )

    def score(self, cumulative_logprob: float, n_tokens: int) -> float:
        """`n_tokens`: prompt and output, less a closing end token."""
        return cumulative_logprob / math.pow(n_tokens, self.length_penalty)
