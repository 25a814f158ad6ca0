"""`ChatSession`: a conversation with a model in this process, answer by answer, within the model's context."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyinfer.errors import EngineError, RequestError
from pyinfer.runtime.chat_prompt import chat_prompt
from pyinfer.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from pyinfer.runtime.loader import LoadedModel
    from pyinfer.runtime.sampling_params import SamplingParams

_ANSWER_ROOM = 256  # tokens that an answer should have before older turns are kept


@dataclass
class AnswerStats:
    """What one answer took."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0  # after the first token
    finish_reason: str = "abort"
    dropped_turns: int = 0  # oldest messages that no longer fitted, over the whole conversation so far

    def __str__(self) -> str:
        rate = (self.answer_tokens - 1) / self.answer_seconds if self.answer_seconds > 0 else 0.0
        return (
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached) in {self.prompt_seconds:.2f} s, "
            f"{self.answer_tokens} answer tokens, {rate:.1f} tokens/s"
        )


class ChatSession:
    """Messages so far and how to sample. Nothing else may use the model's engine meanwhile."""

    def __init__(self, model: LoadedModel, params: SamplingParams, system: str | None = None) -> None:
        self.model = model
        self.params = params
        self.system = system
        self.turns: list[dict[str, Any]] = []  # user and assistant messages, alternating
        self.stats = AnswerStats()
        self.is_stopped = False  # set from a signal handler to end the answer after the current step
        self._dropped = 0
        self._n_asked = 0

    def clear(self) -> None:
        self.turns.clear()
        self._dropped = 0

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. It becomes part of the conversation, also when it is stopped half way.

        Raises `RequestError` if the question alone is over the context; the conversation is then as it was before.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            prompt = self._fitting_prompt()
            yield from self._run(prompt)
        except Exception:
            self.turns[:] = before
            raise

    def _fitting_prompt(self) -> list[int]:
        """The conversation's ids, without the oldest turns if they leave no room for an answer."""
        n_ctx = self.model.n_ctx
        room = min(_ANSWER_ROOM, n_ctx // 4)
        while True:
            prompt = self._prompt()
            if len(prompt) + room <= n_ctx:
                return prompt
            if len(self.turns) <= 1:
                if len(prompt) < n_ctx:
                    return prompt
                raise RequestError(
                    f"the message has {len(prompt)} tokens with its template, and the context holds {n_ctx}; "
                    "shorten it or start with a larger -c"
                )
            del self.turns[: min(2, len(self.turns) - 1)]
            self._dropped += 1

    def _prompt(self) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_prompt(self.model.chat_template, self.model.tokenizer, [*system, *self.turns])

    def _run(self, prompt: list[int]) -> Iterator[str]:
        engine, params = self.model.engine, self.params
        self.is_stopped = False
        self._n_asked += 1
        name = f"chat-{self._n_asked}"
        stream = TextStream(self.model.tokenizer, params)
        self.stats = stats = AnswerStats(prompt_tokens=len(prompt), dropped_turns=self._dropped)
        parts: list[str] = []
        start = time.monotonic()
        first = 0.0
        engine.add_request(name, prompt, params)
        try:
            while not stream.is_finished and not self.is_stopped:
                for output in engine.step():
                    if output.failure is not None:
                        raise EngineError(output.failure.message)
                    if not first:
                        first = time.monotonic()
                        stats.cached_tokens = output.cached_tokens
                    chunk = stream.push(output)
                    stats.answer_tokens += len(chunk.token_ids)
                    stats.finish_reason = chunk.finish_reason or stats.finish_reason
                    if chunk.text:
                        parts.append(chunk.text)
                        yield chunk.text
        finally:
            engine.abort(name)
            end = time.monotonic()
            stats.prompt_seconds = (first or end) - start
            stats.answer_seconds = end - first if first else 0.0
            self.turns.append({"role": "assistant", "content": "".join(parts)})
