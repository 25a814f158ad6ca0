"""A vocabulary on its way from a checkpoint to a GGUF, and what its sources have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.errors import ConvertError

MAX_TOKENS = 1 << 24
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of `tokenizer.ggml.token_type`


@dataclass
class VocabularyTable:
    """The tokens in the order of their ids."""

    model: str  # `tokenizer.ggml.model`
    pre: str  # `tokenizer.ggml.pre`
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further keys
    n_base: int | None = None  # tokens without those that were added at the end; None: as many as there are

    def metadata(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": np.array(self.types, np.int32),
        }
        if self.scores is not None:
            values["tokenizer.ggml.scores"] = np.array(self.scores, np.float32)
        if self.merges is not None:
            values["tokenizer.ggml.merges"] = self.merges
        return values | self.extra

    def drop_added(self, n_vocab: int) -> list[str]:
        """Cut off and return tokens from `n_vocab` on, if all of them were added to the tokenizer's own."""
        if self.n_base is None or n_vocab < self.n_base:
            return []
        pairs = zip(self.tokens[n_vocab:], self.types[n_vocab:], strict=True)
        beyond = [token for token, kind in pairs if kind != UNUSED]
        del self.tokens[n_vocab:], self.types[n_vocab:]
        if self.scores is not None:
            del self.scores[n_vocab:]
        return beyond

    def resize(self, n_vocab: int) -> None:
        """Give every row of the embedding a token."""
        if len(self.tokens) > n_vocab:
            raise ConvertError(
                f"the tokenizer has {len(self.tokens)} tokens and the model {n_vocab} (config.json: 'vocab_size'); "
                "take the tokenizer that belongs to this checkpoint"
            )
        if n_vocab > MAX_TOKENS:
            raise ConvertError(f"the tokenizer has a token with id {n_vocab - 1}; expected at most {MAX_TOKENS} tokens")
        for i in range(len(self.tokens), n_vocab):
            self.tokens.append(f"[PAD{i}]")
            self.types.append(UNUSED)
            if self.scores is not None:
                self.scores.append(-10000.0)


def looks_special(text: str) -> bool:
    """Whether an added token is a control token although the checkpoint does not say so, as llama.cpp guesses."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def added_tokens(checkpoint: HFCheckpoint) -> dict[int, dict[str, Any]]:
    """Added tokens by id, as `tokenizer.json` or `tokenizer_config.json` describes them; the latter counts."""
    listed = checkpoint.json("tokenizer.json").get("added_tokens") or []
    decoder = checkpoint.json("tokenizer_config.json").get("added_tokens_decoder") or {}
    try:
        return {int(entry["id"]): entry for entry in listed} | {int(i): entry for i, entry in decoder.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ConvertError(f"{checkpoint.folder}: an added token is damaged: {error!r}") from None
