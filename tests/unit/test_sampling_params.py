"""SamplingParams: defaults, and every mistake is named."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pyinfer.errors import RequestError
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("best_of", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", float("inf")),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repeat_last_n", -2),
        ("seed", 2**64),
        ("seed", "1"),
        ("stop", [""]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "7"),
        ("bad_words", [1]),
        ("ignore_eos", 1),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("logprobs", -2),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: 101}),
        ("logit_bias", [1]),
        ("priority", 0.5),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams.from_dict({name: value})
    assert caught.value.param is not None and caught.value.param.startswith(name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RequestError, match="top_q"):
        SamplingParams.from_dict({"top_q": 1})
    with pytest.raises(TypeError):
        SamplingParams(top_q=1)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="guided"):
        SamplingParams().replace(guided=1)


def test_bounds_between_parameters() -> None:
    with pytest.raises(RequestError, match="best_of"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=17)
    assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17


def test_forms_that_json_brings() -> None:
    params = SamplingParams(stop="end", logit_bias={"5": 1})  # type: ignore[dict-item]
    assert params.stop_strings == ["end"] and params.logit_bias == {5: 1.0}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_lists_are_copied() -> None:
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("b")
    assert params.stop_strings == ["a"]


def test_chat_defaults_come_from_the_file_if_it_says() -> None:
    plain = SamplingParams.for_chat({})
    assert (plain.temperature, plain.top_k, plain.top_p, plain.min_p, plain.max_tokens) == (0.8, 40, 0.95, 0.05, None)
    given = SamplingParams.for_chat({"general.sampling.temp": 0.6, "general.sampling.top_k": 20})
    assert (given.temperature, given.top_k, given.top_p) == (0.6, 20, 0.95)
