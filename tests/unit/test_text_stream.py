"""TextStream: chunks of ids become text; stop strings cut it, and streaming equals the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyinfer.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.text_stream import TextStream, best, fold
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.unit
IM_END = 299


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[..., Path]) -> Tokenizer:
    return load_tokenizer(tiny_model())


def outputs_of(ids: list[int], *, finish: bool = True, stop_token: int | None = None) -> list[RequestOutput]:
    chunks = [RequestOutput("r", 0, [token]) for token in ids]
    if finish:
        chunks[-1].finish_reason = "length" if stop_token is None else "stop"
        chunks[-1].stop_token = stop_token
    return chunks


def run(tokenizer: Tokenizer, outputs: list[RequestOutput], **params: object) -> tuple[CompletionOutput, TextStream]:
    stream = TextStream(tokenizer, SamplingParams.from_dict(params), 3)
    return fold([stream.push(output) for output in outputs]), stream


def test_text_is_whole_and_characters_are_never_split(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("naïve 例文 🙂 done", add_special=False)
    stream = TextStream(tokenizer, SamplingParams())
    pieces = [stream.push(output).text for output in outputs_of(ids)]
    assert "".join(pieces) == "naïve 例文 🙂 done"
    assert not any("\ufffd" in piece for piece in pieces)
    result, _ = run(tokenizer, outputs_of(ids))
    assert (result.text, result.index, result.token_ids, result.finish_reason) == ("".join(pieces), 3, ids, "length")


def test_stop_string_cuts_text_and_tokens_at_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four", add_special=False)
    result, stream = run(tokenizer, outputs_of(ids, finish=False), stop=["x", " three"])
    assert (result.text, result.finish_reason, result.stop_reason) == ("one two", "stop", " three")
    assert stream.needs_abort and stream.is_finished
    end = len(tokenizer.encode("one two three", add_special=False))
    assert result.token_ids == ids[:end]
    result, _ = run(tokenizer, outputs_of(ids), stop=" three", include_stop_str_in_output=True)
    assert result.text == "one two three"


def test_no_abort_is_asked_for_what_has_ended(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc", add_special=False)
    result, stream = run(tokenizer, outputs_of(ids), stop=["c"])
    assert result.finish_reason == "stop" and not stream.needs_abort


def test_a_stop_that_never_completes_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("it ends with END", add_special=False)
    result, _ = run(tokenizer, outputs_of(ids), stop=["END."])
    assert result.text == "it ends with END" and result.finish_reason == "length"


def test_stop_tokens_are_not_shown_unless_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi", add_special=False)
    full = stop = ids[-1]
    result, _ = run(tokenizer, outputs_of(ids, stop_token=stop), stop_token_ids=[stop])
    assert result.text == tokenizer.decode(ids[:-1]) and result.stop_reason == stop and result.token_ids[-1] == full
    result, _ = run(tokenizer, outputs_of(ids, stop_token=stop), stop_token_ids=[stop], include_stop_str_in_output=True)
    assert result.text == "hi"
    result, _ = run(tokenizer, outputs_of([*ids, IM_END], stop_token=IM_END), skip_special_tokens=False)
    assert (result.text, result.finish_reason, result.stop_reason) == ("hi", "stop", None)


def test_stop_strings_count_only_after_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a.b.c.d", add_special=False)
    result, _ = run(tokenizer, outputs_of(ids), stop=["."], min_tokens=3, max_tokens=20)
    assert result.text == "a.b"


def test_logprobs_stop_with_the_tokens_and_get_their_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("xyz", add_special=False)
    outputs = outputs_of(ids)
    for output in outputs:
        output.new_logprobs = [{output.new_token_ids[0]: Logprob(-0.5, 1)}]
    result, _ = run(tokenizer, outputs, stop=["y"], logprobs=0)
    assert result.logprobs is not None and len(result.logprobs) == 2 and result.cumulative_logprob == -1.0
    assert [next(iter(entry.values())).decoded_token for entry in result.logprobs] == ["x", "y"]
    assert outputs[0].new_logprobs == [{ids[0]: Logprob(-0.5, 1)}], "the engine's chunk stays as it is"


def test_best_of_keeps_the_most_likely(tokenizer: Tokenizer) -> None:
    def sample(index: int, logprob: float) -> CompletionOutput:
        return CompletionOutput(index, str(index), [1], logprob, [{1: Logprob(logprob, 1)}], "length")

    samples = [sample(0, -3.0), sample(1, -1.0), sample(2, -2.0)]
    kept = best(samples, SamplingParams(n=2, best_of=3))
    assert [(c.index, c.text, c.logprobs) for c in kept] == [(0, "1", None), (1, "2", None)]
    assert best(samples, SamplingParams(n=3)) is samples
