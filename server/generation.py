"""Tokens -> text deltas: the one async generator that whole replies and streams both fold.

One `Generation` runs the prompts of a request (one for a chat, any number for a completion), each with `n` samples.
Stop strings are found here, at the edge; the engine is then told to end the sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.outputs import FinishReason, RequestOutput, TokenLogprobs
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.text_stream import TextStream
from pyinfer.server.service import ServedModel


class Delta(msgspec.Struct):
    """What one step added to one choice."""

    index: int  # of the choice: prompt number * samples of a prompt + sample
    text: str  # safe to show: never part of a character or of a stop string
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    is_first: bool  # the choice's first
    prompt_logprobs: list[TokenLogprobs | None] | None  # with a prompt's first delta, if asked for


class Usage(msgspec.Struct):
    """OpenAI's token counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """One request to the server, submitted when built; iterate `deltas()` once, `usage` is complete when it ends.

    With `beams` its choices are the best `params.n` texts of a beam search, each in one delta. Building it raises
    `RequestError` if one of its prompts can never be served.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request_id: str,
        beams: BeamSearchParams | None = None,
    ) -> None:
        self._model = model
        self._params = params
        self.usage = Usage(prompt_tokens=sum(map(len, prompts)))
        self.n_choices = len(prompts) * params.n_samples
        route = request_id.partition("-")[0]  # chatcmpl or cmpl
        ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
        # an error in a later prompt drops the streams of the earlier ones, and that aborts them
        client = model.client
        self._streams = [
            client.generate(prompt, params, request_id=each, route=route)
            if beams is None
            else client.beam_search(prompt, beams, request_id=each, route=route)
            for prompt, each in zip(prompts, ids, strict=True)
        ]

    def deltas(self) -> AsyncGenerator[list[Delta]]:
        """All choices' deltas as they come, together what came together; closing the iterator aborts what still runs.

        Raises `EngineError`.
        """
        return self._run(0) if len(self._streams) == 1 else self._run_all()

    async def _run_all(self) -> AsyncGenerator[list[Delta]]:
        queue: asyncio.Queue[list[Delta] | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(number, queue)) for number in range(len(self._streams))]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item:
                    yield item
                else:
                    running -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, number: int, queue: asyncio.Queue[list[Delta] | Exception]) -> None:
        """The deltas of one prompt, an empty list at their end."""
        try:
            async with aclosing(self._run(number)) as parts:
                async for deltas in parts:
                    queue.put_nowait(deltas)
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait([])

    async def _run(self, number: int) -> AsyncGenerator[list[Delta]]:
        """The deltas of one prompt."""
        n, tokenizer = self._params.n_samples, self._model.tokenizer
        choices = [
            TextStream(tokenizer, self._params, number * n + sample, spells_logprobs=False) for sample in range(n)
        ]
        started = [False] * n
        async with aclosing(self._streams[number]) as stream:
            while outputs := await stream.take():
                deltas: list[Delta] = []
                for output in outputs:
                    sample = output.index
                    if sample == 0:
                        self.usage.cached_tokens += output.cached_tokens
                    if sample >= n or choices[sample].is_finished:
                        continue  # a beam that was not asked for, or what was on its way when a stop string was found
                    deltas.append(self._delta(choices[sample], output, is_first=not started[sample]))
                    started[sample] = True
                if deltas:
                    yield deltas
                if all(each.is_finished for each in choices):
                    return

    def _delta(self, choice: TextStream, output: RequestOutput, *, is_first: bool) -> Delta:
        chunk = choice.push(output)
        if choice.needs_abort:
            self._model.client.abort(output.request_id, output.index)
        self.usage.completion_tokens += len(chunk.token_ids)
        return Delta(
            chunk.index, chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason, is_first,
            output.prompt_logprobs,
        )  # fmt: skip
