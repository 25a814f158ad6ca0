"""WordPiece (`tokenizer.ggml.model` = `bert`): clean the text, split it into words, cover each word greedily with the
longest pieces.

Source: Devlin et al. 2018 (BERT) and llama.cpp's `llm_tokenizer_wpm_session`. In GGUF a piece that begins a word
carries U+2581 in front, and one inside a word has lost its `##`. As in llama.cpp, decomposition keeps the first code
point only.
"""

from __future__ import annotations

import re
import unicodedata

from pyinfer.errors import TokenizerError
from pyinfer.runtime.pretokenizer_steps import WHITE_SPACE
from pyinfer.runtime.vocabulary import Vocabulary

SPACE = "\u2581"
_WHITE = re.compile(f"[{WHITE_SPACE}]")
_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
_MAX_REMEMBERED = 100_000


class _Cleaner(dict[int, str]):
    """A table for `str.translate` that works itself out: what each code point becomes before the text is split at
    spaces.
    """

    def __init__(self, lowercase: bool, strip_accents: bool) -> None:
        super().__init__()
        self._lowercase = lowercase
        self._strip_accents = strip_accents

    def __missing__(self, codepoint: int) -> str:
        out = self[codepoint] = self._clean(codepoint)
        return out

    def _clean(self, codepoint: int) -> str:
        char = chr(codepoint)
        if self._strip_accents:
            char = unicodedata.normalize("NFD", char)[0]
        codepoint, category = ord(char), unicodedata.category(char)
        if _WHITE.match(char):
            return " "
        if codepoint in (0, 0xFFFD) or category in ("Cc", "Cf", "Co", "Cs"):
            return ""
        if self._strip_accents and category[0] == "M":
            return ""
        out = char.lower()[0] if self._lowercase else char
        alone = (
            category[0] == "P"
            or (codepoint < 0x7F and category[0] == "S")
            or any(first <= codepoint <= last for first, last in _CJK)
        )
        return f" {out} " if alone else out


class WordPieceEncoder:
    """Text to ids; a word that the pieces do not cover is one unknown token."""

    def __init__(self, vocabulary: Vocabulary, lowercase: bool = True, strip_accents: bool = True) -> None:
        self._ids = vocabulary.ids
        self._longest = max(map(len, vocabulary.pieces))
        self._cleaner = _Cleaner(lowercase, strip_accents)
        unknown = vocabulary.special.get("unk")
        if unknown is None:
            raise TokenizerError(
                "the vocabulary has no unknown token (tokenizer.ggml.unknown_token_id); convert the model again"
            )
        self._unknown = unknown
        self._remembered: dict[str, list[int]] = {}

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of a piece of text, words and punctuation apart."""
        out: list[int] = []
        for word in text.translate(self._cleaner).split(" "):
            if not word:
                continue
            ids = self._remembered.get(word)
            if ids is None:
                ids = self._cover(SPACE + word)
                if len(self._remembered) >= _MAX_REMEMBERED:
                    self._remembered.clear()
                self._remembered[word] = ids
            out += ids
        return out

    def _cover(self, word: str) -> list[int]:
        out: list[int] = []
        at = 0
        while at < len(word):
            for end in range(min(len(word), at + self._longest), at, -1):
                token = self._ids.get(word[at:end])
                if token is not None:
                    out.append(token)
                    at = end
                    break
            else:
                return [self._unknown]
        return out
