"""`TextStream`: one sample's chunks of ids become text, cut at stop strings. The edge's half of a request.

A whole reply is the fold of the same stream (`fold`), so that streaming and not streaming cannot differ.
"""

from __future__ import annotations

import msgspec

from pyinfer.runtime.detokenizer import IncrementalDetokenizer
from pyinfer.runtime.outputs import (
    BeamSearchSequence,
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    TokenLogprobs,
)
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.tokenizer import Tokenizer


class TextChunk(msgspec.Struct):
    """What one engine chunk adds to one sample, as text."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class TextStream:
    """Feed it the `RequestOutput`s of one sample in order.

    When `needs_abort` is true after a push, a stop string ended the text and the engine must be told to end the sample;
    what it still sends is then ignored.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, index: int = 0, *, spells_logprobs: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._spells_logprobs = spells_logprobs  # False: `decoded_token` is not wanted
        self._params = params
        self._index = index
        self._eog_ids = tokenizer.eog_ids
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            params.skip_special_tokens,
            params.stop_strings,
            params.include_stop_str_in_output,
            continues=True,
            min_tokens=params.min_tokens,
        )
        self.is_finished = False
        self.needs_abort = False

    def push(self, output: RequestOutput) -> TextChunk:
        """The text that is safe to show by now; never splits a character or shows part of a stop string."""
        chunk = TextChunk(self._index, "", [], None if output.new_logprobs is None else [])
        if self.is_finished:
            return chunk
        for i, token in enumerate(output.new_token_ids):
            chunk.token_ids.append(token)
            if chunk.logprobs is not None and output.new_logprobs is not None:
                entries = output.new_logprobs[i]
                chunk.logprobs.append(with_text(entries, self._tokenizer) if self._spells_logprobs else entries)
            if token != output.stop_token or self._params.include_stop_str_in_output:
                chunk.text += self._detokenizer.push(token)
            if self._detokenizer.stopped is not None:
                self.needs_abort = output.finish_reason is None
                break
        if output.finish_reason is not None:
            chunk.text += self._detokenizer.finish()
            chunk.finish_reason = output.finish_reason
            if output.stop_token not in self._eog_ids or output.stop_token in (self._params.stop_token_ids or ()):
                chunk.stop_reason = output.stop_token
        if self._detokenizer.stopped is not None:
            chunk.finish_reason, chunk.stop_reason = "stop", self._detokenizer.stopped
        self.is_finished = chunk.finish_reason is not None
        return chunk


def with_text(logprobs: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprobs:
    """The same entries with `decoded_token`."""
    return {
        token: Logprob(entry.logprob, entry.rank, tokenizer.token_bytes(token).decode("utf-8", "replace"))
        for token, entry in logprobs.items()
    }


def fold(chunks: list[TextChunk]) -> CompletionOutput:
    """A sample's chunks as one whole."""
    last = next((chunk for chunk in chunks if chunk.finish_reason is not None), chunks[-1])
    logprobs = None
    if last.logprobs is not None:
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    return CompletionOutput(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        cumulative_logprob=None if logprobs is None else sum(next(iter(e.values())).logprob for e in logprobs),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def best(completions: list[CompletionOutput], params: SamplingParams) -> list[CompletionOutput]:
    """The n of `best_of` samples with the highest cumulative logprob, numbered from 0; all without `best_of`."""
    if params.best_of is None or params.best_of == params.n:
        return completions
    ranked = sorted(completions, key=lambda c: c.cumulative_logprob or 0.0, reverse=True)[: params.n]
    return [
        msgspec.structs.replace(c, index=i, logprobs=c.logprobs if params.logprobs is not None else None)
        for i, c in enumerate(ranked)
    ]


def beam_sequence(output: RequestOutput, prompt: list[int], tokenizer: Tokenizer) -> BeamSearchSequence:
    """A beam as `LLM.beam_search` returns it."""
    assert output.new_logprobs is not None and output.cumulative_logprob is not None
    tokens = prompt + output.new_token_ids
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=[with_text(entry, tokenizer) for entry in output.new_logprobs],
        cum_logprob=output.cumulative_logprob,
        text=tokenizer.decode(tokens),
        finish_reason=output.finish_reason,
        stop_reason=output.stop_token,
    )
