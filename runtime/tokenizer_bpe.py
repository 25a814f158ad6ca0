"""Byte-pair encoding with a merge list (`tokenizer.ggml.model` = `gpt2`), by the `tokenizers` library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyinfer.errors import TokenizerError
from pyinfer.runtime.merge_cache import Pairs
from pyinfer.runtime.pretokenizers import PreTokenizerSpec, build_pre_tokenizer
from pyinfer.runtime.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import models

SPACE = "\u2581"


class BpeEncoder:
    """Text to ids: pre-tokenizer, alphabet, merges, best first."""

    def __init__(self, vocabulary: Vocabulary, merges: Pairs, spec: PreTokenizerSpec) -> None:
        from tokenizers import Tokenizer

        self._spec = spec
        self._ids = vocabulary.ids
        self._count = len(vocabulary.pieces)
        self._made_up: dict[int, list[int]] = {}
        self._tokenizer = Tokenizer(self._model(merges))
        pre_tokenizer = build_pre_tokenizer(spec)
        if pre_tokenizer is not None:
            self._tokenizer.pre_tokenizer = pre_tokenizer

    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of a piece of text."""
        spec = self._spec
        if spec.escape_spaces:
            text = text.replace(" ", SPACE)
        if spec.lowercase:
            text = "".join([c.lower()[0] for c in text])
        if spec.split_first is None:
            return self._encode(text)
        out: list[int] = []
        for part in spec.split_first(text):
            if spec.whole_line_ends and part[0] == "\n" and part in self._ids:
                out.append(self._ids[part])
            else:
                out += self._encode(part)
        return out

    def _encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            # The regex engine gives up on a run of millions of characters with a Rust panic, which is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(
                f"a run in this text of {len(text):,} characters is too long for the pre-tokenizer; give smaller texts"
            ) from error
        if self._made_up and max(ids, default=0) >= self._count:
            return [i for token in ids for i in self._made_up.get(token, (token,))]
        return ids

    def _model(self, pairs: Pairs) -> models.BPE:
        vocab = self._ids
        options = {"ignore_merges": self._spec.ignore_merges, "byte_fallback": not self._spec.byte_level}
        from tokenizers import models

        try:
            return models.BPE(vocab=vocab, merges=pairs, **options)
        except Exception:
            pairs = [pair for pair in pairs if _is_text(pair[0]) and _is_text(pair[1])]
            vocab = {piece: i for piece, i in vocab.items() if _is_text(piece)}
            self._make_up(vocab, pairs)
            return models.BPE(vocab=vocab, merges=pairs, **options)

    def _make_up(self, vocab: dict[str, int], pairs: Pairs) -> None:
        """Give parts of merges that are no tokens ids past the vocabulary; `encode` takes them apart into byte
        tokens.
        """
        for left, right in pairs:
            for part in (left, right, left + right):
                if part not in vocab:
                    made_up = self._count + len(self._made_up)
                    vocab[part] = made_up
                    self._made_up[made_up] = self._byte_ids(part)

    def _byte_ids(self, part: str) -> list[int]:
        if self._spec.byte_level:
            names = [chr(b) for b in part.encode() if b < 128]
        else:
            names = [f"<0x{b:02X}>" for b in part.encode()]
        return [self._ids[name] for name in names if name in self._ids]


def _is_text(piece: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in piece)
