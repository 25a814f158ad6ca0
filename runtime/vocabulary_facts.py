"""What the engine needs to know of a vocabulary: its size and its end tokens. Text stays at the edge."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Encoder(Protocol):
    """Text to ids."""

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]: ...


class Vocabulary(Encoder, Protocol):
    """As much of a tokenizer as the engine uses."""

    @property
    def n_vocab(self) -> int: ...
    @property
    def eog_ids(self) -> frozenset[int]: ...


class VocabularyFacts(msgspec.Struct, frozen=True):
    """A vocabulary whose tokenizer lives in another process, which spells all words there."""

    n_vocab: int
    eog_ids: frozenset[int]

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        raise AssertionError(f"{text!r} was to be encoded where there is no tokenizer")
