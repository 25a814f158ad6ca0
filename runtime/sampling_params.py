"""`SamplingParams`: how one request turns logits into tokens. vLLM's names, meanings and defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from pyinfer.errors import RequestError

MAX_SAMPLES = 256
_INT64 = (-(2**63), 2**64 - 1)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Validated when built: a `RequestError` names the parameter, its value and the range.

    The steps run in this order: logit_bias, masks (min_tokens, ignore_eos, bad_words), penalties, temperature, min_p,
    top_k, typical_p, top_p. Logprobs are raw: taken before all of them.
    """

    n: int = 1  # samples of one prompt
    best_of: int | None = None  # make so many samples, keep the n with the highest cumulative logprob
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 and -1: off
    top_p: float = 1.0  # arXiv:1904.09751
    min_p: float = 0.0  # arXiv:2407.01082: drops what is less likely than min_p times the most likely token
    typical_p: float = 1.0  # arXiv:2202.00666
    repetition_penalty: float = 1.0  # arXiv:1909.05858, over prompt and output
    presence_penalty: float = 0.0  # once for each token that the output holds
    frequency_penalty: float = 0.0  # for each time that the output holds it
    repeat_last_n: int = -1  # the penalties look at so many last tokens; -1: at all, 0: at none
    logit_bias: dict[int, float] | None = None
    seed: int | None = None  # None draws one from the engine's generator
    stop: str | list[str] | None = None  # kept as a list
    stop_token_ids: list[int] | None = None  # kept as a list
    bad_words: list[str] | None = None  # kept as a list
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False  # end-of-generation tokens are never sampled
    min_tokens: int = 0  # no end before so many output tokens
    max_tokens: int | None = 16  # None: up to the context
    logprobs: int | None = None  # the chosen token's and so many most likely ones'; -1: the whole vocabulary's
    prompt_logprobs: int | None = None  # likewise for each token of the prompt
    skip_special_tokens: bool = True
    priority: int = 0  # a lower value is served first

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_SAMPLES)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, MAX_SAMPLES)
        _number("temperature", self.temperature, 0.0, 1e6)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, low_open=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e6, low_open=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("repeat_last_n", self.repeat_last_n, -1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, *_INT64)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "true or false")
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise _error("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), -1, 2**31 - 1)
        _integer("priority", self.priority, *_INT64)
        set_field = msgspec.structs.force_setattr
        set_field(self, "stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        set_field(self, "bad_words", _strings("bad_words", self.bad_words))
        set_field(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        set_field(self, "logit_bias", _bias(self.logit_bias))

    @property
    def n_samples(self) -> int:
        """How many samples the engine makes."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> list[str]:
        return self.stop if isinstance(self.stop, list) else []

    @property
    def needs_logprobs(self) -> bool:
        return self.logprobs is not None or (self.best_of is not None and self.best_of > self.n)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return SamplingParams.from_dict({**msgspec.structs.asdict(self), **changes})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """From outside (JSON, TOML, keywords); an unknown name is a `RequestError`."""
        for name in fields:
            if name not in cls.__struct_fields__:
                raise RequestError(f"{name} is not a sampling parameter", param=name)
        return cls(**fields)

    @classmethod
    def for_chat(cls, metadata: Mapping[str, Any]) -> SamplingParams:
        """A chat's defaults: `general.sampling.*`, else temperature 0.8, top_k 40, top_p 0.95, min_p 0.05."""
        fields: dict[str, Any] = {"max_tokens": None}
        for name, key, default in _CHAT_DEFAULTS:
            fields[name] = metadata.get(f"general.sampling.{key}", default)
        fields["top_k"] = int(fields["top_k"])
        return cls.from_dict(fields)


_CHAT_DEFAULTS: tuple[tuple[str, str, int | float], ...] = (
    ("temperature", "temp", 0.8),
    ("top_k", "top_k", 40),
    ("top_p", "top_p", 0.95),
    ("min_p", "min_p", 0.05),
    ("repetition_penalty", "penalty_repeat", 1.0),
    ("repeat_last_n", "penalty_last_n", -1),
)


def _error(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name} is {value!r}; it must be {expected}", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _error(name, value, f"an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    inside = (
        not isinstance(value, bool)
        and isinstance(value, int | float)
        and math.isfinite(value)
        and (low < value if low_open else low <= value)
        and value <= high
    )
    if not inside:
        raise _error(name, value, f"a number from {low:g}{' (not included)' if low_open else ''} to {high:g}")


def _strings(name: str, value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(s, str) and s for s in value):
        raise _error(name, value, "a list of strings, none of them empty")
    return list(value)


def _token_ids(name: str, value: object) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise _error(name, value, "a list of token ids")
    return list(value)


def _bias(value: object) -> dict[int, float] | None:
    """JSON's keys are strings, so ids are taken as such too."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _error("logit_bias", value, "a mapping from token id to a number from -100 to 100")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        token = int(key) if isinstance(key, str) and key.isdecimal() else key
        if type(token) is not int or not 0 <= token < 2**31:
            raise RequestError(f"logit_bias has the key {key!r}; keys must be token ids", param="logit_bias")
        _number(f"logit_bias[{token}]", amount, -100.0, 100.0)
        bias[token] = float(amount)
    return bias or None
