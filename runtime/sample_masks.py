"""Sampling steps that add to or forbid single tokens: logit_bias, the masks of end tokens, bad_words.

A step changes a row of logits, float32 [n_vocab], in place; `output` is what the sequence has produced so far.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq

import numpy as np

from pyinfer.graph.ops import F32Array
from pyinfer.runtime.vocabulary_facts import Encoder

_NEVER = np.float32(-np.inf)


class LogitBias:
    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids = np.fromiter(bias.keys(), np.int64)
        self.amounts = np.fromiter(bias.values(), np.float32)

    def apply(self, row: F32Array) -> None:
        row[self.ids] += self.amounts


class EndMask:
    """Forbids `always` at every step and `early` until there are `min_tokens` output tokens."""

    def __init__(self, always: Collection[int], early: Collection[int], min_tokens: int) -> None:
        self._always = np.array(sorted(always), np.int64)
        self._both = np.array(sorted({*always, *early}), np.int64)
        self._min_tokens = min_tokens

    def masked(self, n_output: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._both if n_output < self._min_tokens else self._always

    def apply(self, row: F32Array, n_output: int) -> None:
        row[self.masked(n_output)] = _NEVER


class BadWords:
    """Forbids the token that would complete one of some token sequences in the output."""

    def __init__(self, words: Seq[Seq[int]]) -> None:
        self._words = [(list(word[:-1]), word[-1]) for word in words if word]

    def apply(self, row: F32Array, output: list[int]) -> None:
        row[self.forbidden(output)] = _NEVER

    def forbidden(self, output: list[int]) -> list[int]:
        return [last for start, last in self._words if not start or output[-len(start) :] == start]


def spell_bad_words(words: Iterable[str], vocabulary: Encoder) -> list[list[int]]:
    """Each word as it is spelled at the start of a text and after a space."""
    spellings = [text for word in words for text in (word, " " + word.lstrip())]
    ids = [vocabulary.encode(text, add_special=False) for text in spellings]
    return [word for i, word in enumerate(ids) if word and word not in ids[:i]]
