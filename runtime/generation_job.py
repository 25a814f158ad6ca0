"""`GenerationJob`: one prompt of `LLM.generate` while its samples grow."""

from __future__ import annotations

from pyinfer.runtime.engine import Engine
from pyinfer.runtime.outputs import GenerationOutput, RequestMetrics, RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.text_stream import TextChunk, TextStream, best, fold, with_text
from pyinfer.runtime.tokenizer import Tokenizer


class GenerationJob:
    """Tells the engine when a stop string ends a sample."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._params = params
        self._streams = [TextStream(tokenizer, params, i) for i in range(params.n_samples)]
        self._chunks: list[list[TextChunk]] = [[] for _ in self._streams]
        self._first: RequestOutput | None = None
        self._metrics: RequestMetrics | None = None

    def push(self, output: RequestOutput) -> bool:
        """Take a chunk; True once all samples are finished."""
        stream = self._streams[output.index]
        if output.index == 0 and self._first is None:
            self._first = output
        self._chunks[output.index].append(stream.push(output))
        if stream.needs_abort:
            stream.needs_abort = False
            for last in self._engine.abort(output.request_id, output.index):
                output.metrics = last.metrics
        if output.metrics is not None:
            self._note(output.metrics)
        return all(stream.is_finished for stream in self._streams)

    def _note(self, metrics: RequestMetrics) -> None:
        """The request's times: its first sample's, up to the end of its last."""
        if self._metrics is None:
            self._metrics = metrics
        else:
            self._metrics.finished_time = max(self._metrics.finished_time, metrics.finished_time)
            self._metrics.preemptions += metrics.preemptions

    def result(self, name: str, text: str | None, ids: list[int]) -> GenerationOutput:
        prompt_logprobs = None if self._first is None else self._first.prompt_logprobs
        if prompt_logprobs is not None:
            prompt_logprobs = [
                None if entry is None else with_text(entry, self._tokenizer) for entry in prompt_logprobs
            ]
        return GenerationOutput(
            request_id=name,
            prompt=text,
            prompt_token_ids=ids,
            prompt_logprobs=prompt_logprobs,
            outputs=best([fold(chunks) for chunks in self._chunks], self._params),
            metrics=self._metrics,
            num_cached_tokens=0 if self._first is None else self._first.cached_tokens,
        )
