"""Vocabularies of Hugging Face `tokenizers`: byte-level BPE and WordPiece."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.hf_tokenizer import load_hf_tokenizer, read_merges
from pyinfer.convert.pretokenizer import pretokenizer_name
from pyinfer.convert.vocabulary_table import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    VocabularyTable,
    added_tokens,
    looks_special,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"
_NORMAL = 1


def byte_level(checkpoint: HFCheckpoint, pre_tokenizer: str | None) -> VocabularyTable:
    """BPE over bytes ('gpt2') from `tokenizer.json`, or from `vocab.json` and `merges.txt`."""
    tokenizer = load_hf_tokenizer(checkpoint)
    tokens, types = _tokens(checkpoint, tokenizer)
    pre = pre_tokenizer or pretokenizer_name(tokenizer)
    return VocabularyTable("gpt2", pre, tokens, types, merges=read_merges(checkpoint))


def wordpiece(checkpoint: HFCheckpoint, pre_tokenizer: str | None) -> VocabularyTable:
    """WordPiece ('bert'): a piece that starts a word carries a space, one that continues it loses its '##'."""
    tokenizer = load_hf_tokenizer(checkpoint)
    tokens, types = _tokens(checkpoint, tokenizer)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != CONTROL:
            tokens[i] = token[2:] if token.startswith("##") else _SPACE + token
    return VocabularyTable("bert", pre_tokenizer or pretokenizer_name(tokenizer), tokens, types)


def _tokens(checkpoint: HFCheckpoint, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = {i: (t.content, t.special, t.normalized) for i, t in tokenizer.get_added_tokens_decoder().items()}
    for i, entry in added_tokens(checkpoint).items():
        added.setdefault(i, (entry["content"], bool(entry.get("special")), bool(entry.get("normalized", True))))
    by_id = {i: text for text, i in vocab.items()} | {i: text for i, (text, _, _) in added.items()}
    size = max(by_id) + 1
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_NORMAL if i in by_id else UNUSED for i in range(size)]
    for i, (text, is_special, is_normalized) in added.items():
        if not is_normalized and text in vocab:  # readers match these in normalized text
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if is_special or looks_special(text):
            tokens[i], types[i] = text, CONTROL
        else:
            tokens[i], types[i] = text.replace(_SPACE, " "), USER_DEFINED
    return tokens, types
