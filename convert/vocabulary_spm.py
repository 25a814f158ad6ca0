"""SentencePiece vocabularies: from `tokenizer.model`, or from a `tokenizer.json` that was made of one."""

from __future__ import annotations

import re
from typing import Any

from pyinfer.convert.family import Family
from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.sentencepiece_model import PieceKind, read_sentencepiece
from pyinfer.convert.vocabulary_table import CONTROL, USER_DEFINED, VocabularyTable, added_tokens, looks_special
from pyinfer.errors import ConvertError

_ADDED_SCORE = -1000.0
_SPACE = "\u2581"  # SentencePiece's stand-in for a space
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def from_model(checkpoint: HFCheckpoint, family: Family) -> VocabularyTable:
    """Pieces of `tokenizer.model`, then what `added_tokens.json` and the added tokens say."""
    pieces = read_sentencepiece(checkpoint.folder / "tokenizer.model")
    table = VocabularyTable(
        "llama", "default", [p.text for p in pieces], [int(p.kind) for p in pieces], [p.score for p in pieces]
    )
    for i, kind in enumerate(table.types):
        if kind == PieceKind.USER_DEFINED:
            table.tokens[i] = table.tokens[i].replace(_SPACE, " ")
    _apply_added(table, checkpoint)
    adds_space = family.adds_space
    if adds_space is None:
        adds_space = checkpoint.json("tokenizer_config.json").get("add_prefix_space")
    if isinstance(adds_space, bool):
        table.extra["tokenizer.ggml.add_space_prefix"] = adds_space
    return table


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is BPE over characters with a fallback to bytes, as SentencePiece does it."""
    model = tokenizer.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def from_json(checkpoint: HFCheckpoint, family: Family) -> VocabularyTable:
    """The same from `tokenizer.json`. A piece's score is the place of its merge, which is how SentencePiece orders."""
    tokenizer = checkpoint.json("tokenizer.json")
    try:
        vocab: dict[str, int] = tokenizer["model"]["vocab"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
        ranks: dict[str, float] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, -float(rank))
        size = max(vocab.values()) + 1
        unknown = tokenizer["model"].get("unk_token")
    except (KeyError, TypeError, ValueError) as error:
        raise ConvertError(f"{checkpoint.folder / 'tokenizer.json'}: is damaged: {error!r}") from None
    table = VocabularyTable("llama", "default", [], [], [])
    table.resize(size)
    assert table.scores is not None
    lowest = -float(len(merges))  # of single characters; a piece that no merge makes comes after all others
    for text, i in vocab.items():
        kind = PieceKind.BYTE if _BYTE.fullmatch(text) else PieceKind.NORMAL
        table.tokens[i], table.types[i] = text, int(PieceKind.UNKNOWN if text == unknown else kind)
        table.scores[i] = ranks.get(text, lowest if len(text) == 1 else _ADDED_SCORE + lowest)
    _apply_added(table, checkpoint)
    adds_space = family.adds_space
    table.extra["tokenizer.ggml.add_space_prefix"] = _prepends_space(tokenizer) if adds_space is None else adds_space
    return table


def _apply_added(table: VocabularyTable, checkpoint: HFCheckpoint) -> None:
    table.n_base = len(table.tokens)
    for text, i in checkpoint.json("added_tokens.json").items():
        _put(table, int(i), text, USER_DEFINED)
    for i, entry in added_tokens(checkpoint).items():
        is_control = bool(entry.get("special")) or looks_special(entry["content"])
        text = entry["content"] if is_control else entry["content"].replace(_SPACE, " ")
        _put(table, i, text, CONTROL if is_control else USER_DEFINED)


def _put(table: VocabularyTable, i: int, text: str, kind: int) -> None:
    table.resize(max(len(table.tokens), i + 1))
    assert table.scores is not None
    table.tokens[i], table.types[i], table.scores[i] = text, kind, _ADDED_SCORE


def _prepends_space(tokenizer: dict[str, Any]) -> bool:
    """Whether the normalizer or pre-tokenizer puts a space before a text."""
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
