"""`SequenceSampler`: one sequence's way from logits to tokens; `sample` does a whole step's.

The steps, in this order: logit_bias, masks of end tokens, bad_words, penalties (`sample_masks`, `sample_penalties`),
then temperature, min_p, top_k, typical_p, top_p and the draw (`sample_filters`) with a counter-based number
(`sample_random`). Each row is worked on by itself, so its token does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from pyinfer.graph.ops import F32Array
from pyinfer.graph.sampling import EDIT, NOT_FINITE, RowSampling
from pyinfer.runtime.sample_filters import draw
from pyinfer.runtime.sample_masks import BadWords, EndMask, LogitBias
from pyinfer.runtime.sample_penalties import Penalties
from pyinfer.runtime.sample_random import signed, uniform
from pyinfer.runtime.sampling_params import SamplingParams

__all__ = ["NOT_FINITE", "SequenceSampler", "sample"]
_GREEDY_BELOW = 1e-5


class SequenceSampler:
    """Made once for a sequence. `seed` and `index` key its randomness."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        index: int,
        n_prompt: int,
        eog_ids: Collection[int] = (),
        bad_words: Seq[Seq[int]] = (),
    ) -> None:
        self._params = params
        self._seed = seed
        self._index = index
        self._n_prompt = n_prompt
        self._bias = LogitBias(params.logit_bias) if params.logit_bias else None
        self._end_mask: EndMask | None = None
        if params.ignore_eos or params.min_tokens:
            always = eog_ids if params.ignore_eos else ()
            self._end_mask = EndMask(always, {*eog_ids, *(params.stop_token_ids or ())}, params.min_tokens)
        self._bad_words = BadWords(bad_words) if bad_words else None
        self._penalties = Penalties(params, n_prompt) if Penalties.wanted(params) else None
        self._is_greedy = params.temperature < _GREEDY_BELOW
        changes_logits = self._bias or self._bad_words or self._penalties
        self._only_end_mask = self._end_mask is not None and not changes_logits
        self.is_argmax = self._is_greedy and self._end_mask is None and not changes_logits

    def next(self, row: F32Array, tokens: list[int]) -> int:
        """The next token after `tokens` (prompt and output), or `NOT_FINITE`; `row` is left as it is."""
        best = int(row.argmax())
        if not math.isfinite(row[best]):
            return NOT_FINITE
        if self._is_greedy and (self.is_argmax or (self._only_end_mask and not self._is_masked(best, tokens))):
            return best
        row = self._changed(row, tokens)
        if self._is_greedy:
            return int(row.argmax())
        return draw(row, self._params, uniform(self._seed, self._index, len(tokens)))

    def on_device(self, row: int, tokens: list[int], n_coming: int = 0) -> RowSampling | None:
        """The same for a stage that samples; None for what those do not know: typical_p, the whole vocabulary's logprobs.

        `n_coming` more tokens are not known yet, which is for samplers without history.
        """
        params = self._params
        if params.typical_p < 1.0 or params.logprobs == -1:
            return None
        position = len(tokens) + n_coming
        return RowSampling(
            row=row,
            temperature=0.0 if self._is_greedy else params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            number=0.0 if self._is_greedy else uniform(self._seed, self._index, position),
            counter=(signed(self._seed), self._index, position),
            edits=None if self.is_argmax else self._edits(tokens),
            n_logprobs=(params.logprobs or 0) if params.needs_logprobs else None,
        )

    @property
    def has_history(self) -> bool:
        """Whether edits change with the tokens that come: those of several steps cannot be told before."""
        return bool(self._penalties or self._bad_words or (self._end_mask and self._params.min_tokens))

    def _edits(self, tokens: list[int]) -> npt.NDArray[np.void] | None:
        """What `_changed` does to single logits, as EDIT [n]."""
        none = np.empty(0, np.int64)
        biased = self._bias.ids if self._bias else none
        masked = self._end_mask.masked(len(tokens) - self._n_prompt) if self._end_mask else none
        bad = np.array(self._bad_words.forbidden(tokens[self._n_prompt :]) if self._bad_words else [], np.int64)
        seen, produced, amounts = (
            self._penalties.of(tokens) if self._penalties else (none, none, np.empty(0, np.float32))
        )
        ids = np.unique(np.concatenate([biased, masked, bad, seen, produced]))
        if not ids.size:
            return None
        edits = np.zeros(ids.size, EDIT)
        edits["token"], edits["repetition"] = ids, 1.0
        if self._bias:
            edits["bias"][np.searchsorted(ids, biased)] = self._bias.amounts
        edits["bias"][np.searchsorted(ids, np.concatenate([masked, bad]))] = -np.inf
        if self._penalties:
            edits["repetition"][np.searchsorted(ids, seen)] = self._penalties.repetition
            edits["penalty"][np.searchsorted(ids, produced)] = amounts
        return edits

    def _is_masked(self, token: int, tokens: list[int]) -> bool:
        assert self._end_mask is not None
        return bool((self._end_mask.masked(len(tokens) - self._n_prompt) == token).any())

    def _changed(self, row: F32Array, tokens: list[int]) -> F32Array:
        """The row after every step that changes single logits; a copy unless none does."""
        if not (self._bias or self._end_mask or self._bad_words or self._penalties):
            return row
        row = row.copy()
        if self._bias:
            self._bias.apply(row)
        if self._end_mask:
            self._end_mask.apply(row, len(tokens) - self._n_prompt)
        if self._bad_words:
            self._bad_words.apply(row, tokens[self._n_prompt :])
        if self._penalties:
            self._penalties.apply(row, tokens)
        return row


def sample(logits: F32Array, rows: Seq[int], samplers: Seq[SequenceSampler], histories: Seq[list[int]]) -> list[int]:
    """A token, or `NOT_FINITE`, for each of `rows` of `logits`, float32 [n_rows, n_vocab]."""
    if list(rows) == list(range(logits.shape[0])) and all(sampler.is_argmax for sampler in samplers):
        tokens = logits.argmax(axis=1)
        chosen = logits[range(len(rows)), tokens].tolist()
        return [
            token if math.isfinite(value) else NOT_FINITE for token, value in zip(tokens.tolist(), chosen, strict=True)
        ]
    return [sampler.next(logits[row], history) for row, sampler, history in zip(rows, samplers, histories, strict=True)]
