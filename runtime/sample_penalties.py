"""Penalties on tokens that occurred: repetition (arXiv:1909.05858), presence and frequency (OpenAI's).

vLLM's meaning: repetition looks at prompt and output, presence and frequency at the output. `repeat_last_n` narrows all
three to the last n tokens of both.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from pyinfer.graph.ops import F32Array
from pyinfer.runtime.sampling_params import SamplingParams

Ids = npt.NDArray[np.int64]


class Penalties:
    """Belongs to one sequence: without a window it counts each token once, when it first sees it."""

    def __init__(self, params: SamplingParams, n_prompt: int) -> None:
        self._repetition = np.float32(params.repetition_penalty)
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._window = params.repeat_last_n
        self._n_prompt = n_prompt
        self._n_seen = 0
        self._seen: set[int] = set()
        self._counts: Counter[int] = Counter()  # of the output

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        neutral = params.repetition_penalty == 1.0 and not params.presence_penalty and not params.frequency_penalty
        return not neutral and params.repeat_last_n != 0

    def apply(self, row: F32Array, tokens: list[int]) -> None:
        """Change `row`, float32 [n_vocab], in place; `tokens` is the prompt and the output."""
        seen, produced, amounts = self.of(tokens)
        if self._repetition != 1.0:
            values = row[seen]
            row[seen] = np.where(values > 0, values / self._repetition, values * self._repetition)
        row[produced] -= amounts

    @property
    def repetition(self) -> np.float32:
        return self._repetition

    def of(self, tokens: list[int]) -> tuple[Ids, Ids, F32Array]:
        """The ids that repetition looks at, those of the output, and what their logits are lowered by."""
        if self._window > 0:
            first = max(0, len(tokens) - self._window)
            seen = set(tokens[first:])
            counts = Counter(tokens[max(first, self._n_prompt) :])
        else:
            self._seen.update(tokens[self._n_seen :])
            self._counts.update(tokens[max(self._n_seen, self._n_prompt) :])
            self._n_seen = len(tokens)
            seen, counts = self._seen, self._counts
        if not (self._presence or self._frequency):
            counts = Counter()
        amounts = np.fromiter(counts.values(), np.float32, len(counts))
        return (
            np.fromiter(seen if self._repetition != 1.0 else (), np.int64),
            np.fromiter(counts.keys(), np.int64, len(counts)),
            np.float32(self._frequency) * amounts + np.float32(self._presence),
        )
