"""Vocabularies of Hugging Face `tokenizers`: byte-level BPE and WordPiece."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.pretokenizer import pretokenizer_name
from pyinfer.convert.vocabulary_table import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    VocabularyTable,
    added_tokens,
    looks_special,
)
from pyinfer.errors import ConvertError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"
_NORMAL = 1
# How the tokenizers split that come without a tokenizer.json: class -> pattern before the bytes; None: GPT-2's own.
_PATTERNS = {
    "GPT2Tokenizer": None,
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def byte_level(checkpoint: HFCheckpoint, pre_tokenizer: str | None) -> VocabularyTable:
    """BPE over bytes ('gpt2') from `tokenizer.json`, or from `vocab.json` and `merges.txt`."""
    tokenizer = load_hf_tokenizer(checkpoint)
    tokens, types = _tokens(checkpoint, tokenizer)
    pre = pre_tokenizer or pretokenizer_name(tokenizer)
    return VocabularyTable("gpt2", pre, tokens, types, merges=_merges(checkpoint))


def wordpiece(checkpoint: HFCheckpoint, pre_tokenizer: str | None) -> VocabularyTable:
    """WordPiece ('bert'): a piece that starts a word carries a space, one that continues it loses its '##'."""
    tokenizer = load_hf_tokenizer(checkpoint)
    tokens, types = _tokens(checkpoint, tokenizer)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != CONTROL:
            tokens[i] = token[2:] if token.startswith("##") else _SPACE + token
    return VocabularyTable("bert", pre_tokenizer or pretokenizer_name(tokenizer), tokens, types)


def load_hf_tokenizer(checkpoint: HFCheckpoint) -> Tokenizer:
    """The checkpoint's own tokenizer, for whole texts of any length; ConvertError if there is none."""
    from tokenizers import Tokenizer

    path = checkpoint.folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ConvertError(f"{path}: cannot be read as a tokenizer: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if checkpoint.has("vocab.txt"):
        return _from_vocab_txt(checkpoint)
    if checkpoint.has("vocab.json") and checkpoint.has("merges.txt"):
        return _from_vocab_json(checkpoint)
    raise ConvertError(
        f"{checkpoint.folder}: has no tokenizer.json; save one with "
        "AutoTokenizer.from_pretrained(...).save_pretrained()"
    )


def _from_vocab_json(checkpoint: HFCheckpoint) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    name = str(checkpoint.json("tokenizer_config.json").get("tokenizer_class"))
    if name not in _PATTERNS:
        raise ConvertError(
            f"{checkpoint.folder}: how {name!r} splits text is only known from a tokenizer.json; save one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained()"
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _merges(checkpoint))]
    tokenizer = Tokenizer(BPE(checkpoint.json("vocab.json"), merges))
    pattern = _PATTERNS[name]
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
    added = added_tokens(checkpoint)
    texts = {i: entry["content"] for i, entry in added.items()}
    texts |= {i: text for text, i in checkpoint.json("added_tokens.json").items()}
    for i in sorted(texts):
        is_special = bool(added.get(i, {}).get("special"))
        tokenizer.add_tokens([AddedToken(texts[i], special=is_special, normalized=False)])
    return tokenizer


def _from_vocab_txt(checkpoint: HFCheckpoint) -> Tokenizer:
    from tokenizers import BertWordPieceTokenizer

    lowercase = checkpoint.json("tokenizer_config.json").get("do_lower_case", True)
    vocab = {token: i for i, token in enumerate(checkpoint.text("vocab.txt").splitlines())}
    wrapped = BertWordPieceTokenizer(vocab, lowercase=bool(lowercase))
    tokenizer: Tokenizer = wrapped._tokenizer
    return tokenizer


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


def _merges(checkpoint: HFCheckpoint) -> list[str]:
    """'left right', from `merges.txt` or either form in `tokenizer.json`; a space inside a part becomes U+0120."""
    found: Any = (checkpoint.json("tokenizer.json").get("model") or {}).get("merges")
    if not found and checkpoint.has("merges.txt"):
        lines = checkpoint.text("merges.txt").replace("\r", "").split("\n")
        found = [line for i, line in enumerate(lines) if line.strip() and not (i == 0 and line.startswith("#"))]
    if not found:
        raise ConvertError(f"{checkpoint.folder}: the tokenizer has no merges; is it byte-level BPE?")
    merges = [merge if isinstance(merge, str) else " ".join(p.replace(" ", "\u0120") for p in merge) for merge in found]
    for merge in merges:
        if merge.count(" ") != 1:
            raise ConvertError(f"{checkpoint.folder}: {json.dumps(merge)} is no merge of two tokens")
    return merges
