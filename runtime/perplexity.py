"""How well a model predicts a text, and how far two models are apart on it.

Perplexity is llama.cpp's: the text is cut into chunks of `n_ctx` tokens, each starts with BOS in place of its first
token if the model wants one, and only the second half of a chunk is scored, so that every token has some context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pyinfer.errors import RequestError
from pyinfer.runtime.tokenizer import Tokenizer

F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
_ROWS = 32  # of logits in float64 at a time

OnChunk = Callable[[int, float], None]  # chunks done, perplexity so far


class Scorer(Protocol):
    """What `LLM` offers."""

    def logits(self, token_ids: Sequence[int], /) -> F32Array:
        """float32 [n_tokens, n_vocab]; row i predicts token i + 1."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: F64Array) -> Estimate:
        spread = values.std() / math.sqrt(len(values) - 1) if len(values) > 1 else 0.0
        return cls(float(values.mean()), float(spread))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token."""

    value: float
    error: float
    n_tokens: int  # scored

    @classmethod
    def of(cls, nll: F64Array) -> Perplexity:
        mean = Estimate.of(nll)
        value = math.exp(mean.mean)
        return cls(value, value * mean.error, len(nll))


@dataclass(frozen=True)
class Comparison:
    """A model against its base, token by token over the same text."""

    base: Perplexity
    model: Perplexity
    kl_divergence: Estimate  # of the model from the base, in nats a token
    max_kl_divergence: float
    top1_agreement: Estimate  # share of tokens for which both have the same best guess


def text_chunks(tokenizer: Tokenizer, text: str, n_ctx: int, max_chunks: int | None = None) -> list[list[int]]:
    """The text as chunks of n_ctx ids; what is left at its end is not used. RequestError under two chunks."""
    if n_ctx < 4:
        raise RequestError(f"a chunk of {n_ctx} tokens is too short to score its second half; use at least 4")
    ids = tokenizer.encode(text)
    if len(ids) < 2 * n_ctx:
        raise RequestError(
            f"the text has {len(ids)} tokens, and two chunks of {n_ctx} take {2 * n_ctx}; use a longer text or a "
            f"chunk of at most {len(ids) // 2}"
        )
    n_chunks = min(len(ids) // n_ctx, max_chunks or len(ids))
    chunks = [ids[i * n_ctx : (i + 1) * n_ctx] for i in range(n_chunks)]
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        for chunk in chunks:
            chunk[0] = tokenizer.bos_id
    return chunks


def measure(model: Scorer, chunks: Sequence[list[int]], on_chunk: OnChunk = lambda done, value: None) -> Perplexity:
    """The perplexity of a model over chunks of token ids."""
    parts: list[F64Array] = []
    for done, ids in enumerate(chunks, 1):
        parts += [-_of_targets(*part) for part in _scored(model.logits(ids), ids)]
        on_chunk(done, Perplexity.of(np.concatenate(parts)).value)
    return Perplexity.of(np.concatenate(parts))


def compare(
    base: Scorer, model: Scorer, chunks: Sequence[list[int]], on_chunk: OnChunk = lambda done, value: None
) -> Comparison:
    """How far a model is from its base over chunks of token ids."""
    base_nll: list[F64Array] = []
    model_nll: list[F64Array] = []
    divergence: list[F64Array] = []
    same: list[F64Array] = []
    for done, ids in enumerate(chunks, 1):
        rows = zip(_scored(base.logits(ids), ids), _scored(model.logits(ids), ids), strict=True)
        for (p, targets), (q, _) in rows:
            base_nll.append(-_of_targets(p, targets))
            model_nll.append(-_of_targets(q, targets))
            # rounding can leave equal distributions a hair below zero
            divergence.append(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0))
            same.append((p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64))
        on_chunk(done, Perplexity.of(np.concatenate(model_nll)).value)
    kl = np.concatenate(divergence)
    return Comparison(
        Perplexity.of(np.concatenate(base_nll)),
        Perplexity.of(np.concatenate(model_nll)),
        Estimate.of(kl),
        float(kl.max()),
        Estimate.of(np.concatenate(same)),
    )


def _scored(logits: F32Array, ids: list[int]) -> Iterator[tuple[F64Array, npt.NDArray[np.int64]]]:
    """(log-probabilities float64 [m, n_vocab], the m ids they should have predicted), for the second half of a chunk."""
    first, targets = len(ids) // 2, np.array(ids[1:], np.int64)
    for start in range(first, len(ids) - 1, _ROWS):
        rows = slice(start, min(start + _ROWS, len(ids) - 1))
        wide = logits[rows].astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
        yield wide, targets[rows]


def _of_targets(log_probabilities: F64Array, targets: npt.NDArray[np.int64]) -> F64Array:
    return log_probabilities[np.arange(len(targets)), targets]
