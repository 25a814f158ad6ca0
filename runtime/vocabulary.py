"""The vocabulary of a GGUF file: pieces, kinds, scores, special ids, and which tokens end a generation.

Rules and defaults are llama.cpp's (`llama_vocab::impl::load`), so that every file means here what it means there. Two
differences, both for safety: gpt-oss's channel markers stay control tokens (llama.cpp lets any text spell them),
though decode shows them as there; and of several tokens that could be the end of a turn, the first of our list is
`eot_id` (llama.cpp takes the first of a hash table).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import numpy as np

from pyinfer.errors import TokenizerError
from pyinfer.quant.gguf import GGUFFile


class TokenKind(IntFlag):
    """What a token is, as bits: a file gives one, the rules below may add CONTROL."""

    NONE = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 4
    USER_DEFINED = 8
    UNUSED = 16
    BYTE = 32


_KIND_OF_TYPE = np.array(
    [
        TokenKind.NONE,
        TokenKind.NORMAL,
        TokenKind.UNKNOWN,
        TokenKind.CONTROL,
        TokenKind.USER_DEFINED,
        TokenKind.UNUSED,
        TokenKind.BYTE,
    ],
    np.uint8,
)  # index: tokenizer.ggml.token_type

_EOT_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
_EOM_TEXTS = ("<|eom_id|>",)
_END_TEXTS = (
    *_EOT_TEXTS,
    *_EOM_TEXTS,
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
)
_FILL_IN_TEXTS = {  # fill-in-the-middle; the pad, repository and separator tokens also end a generation
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_OLD_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
_KEY_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # "seperator" is the key's own spelling


@dataclass
class Vocabulary:
    """Pieces by id with their kinds and scores; `special` maps bos, eos, eot, ... to ids. Read-only after
    `read_vocabulary`.
    """

    pieces: list[str]
    ids: dict[str, int]
    kinds: np.ndarray  # uint8 [n_vocab], TokenKind bits
    scores: np.ndarray  # float32 [n_vocab]
    special: dict[str, int] = field(default_factory=dict)
    eog_ids: frozenset[int] = frozenset()
    shown_ids: frozenset[int] = frozenset()  # control tokens that decode shows all the same

    def ids_of_kind(self, kinds: TokenKind) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.kinds & int(kinds))]


def _numbers(file: GGUFFile, key: str, count: int, dtype: type[np.generic]) -> np.ndarray | None:
    values = file.metadata.get(key)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf" or len(values) < count:
        raise TokenizerError(
            f"{key} does not hold one number for each of the {count} tokens; the file is damaged, fetch it again"
        )
    return values[:count].astype(dtype)


def read_vocabulary(file: GGUFFile, defaults: dict[str, int]) -> Vocabulary:
    """Read `tokenizer.ggml.*`. `defaults`: the special ids that the tokenizer's model has where the file is silent."""
    pieces = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or not pieces or not all(map(str.__instancecheck__, pieces)):
        raise TokenizerError(
            "the file holds no vocabulary (tokenizer.ggml.tokens); use a GGUF that was converted with its tokenizer"
        )
    if "" in pieces:
        pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(pieces)]
    count = len(pieces)
    types = _numbers(file, "tokenizer.ggml.token_type", count, np.int64)
    scores = _numbers(file, "tokenizer.ggml.scores", count, np.float32)
    if types is None:
        kinds = np.full(count, TokenKind.NORMAL, np.uint8)
    else:
        kinds = _KIND_OF_TYPE[np.where((types > 0) & (types < len(_KIND_OF_TYPE)), types, 0)]
    vocabulary = Vocabulary(
        pieces=pieces,
        ids=dict(zip(pieces, range(count), strict=True)),
        kinds=kinds,
        scores=np.zeros(count, np.float32) if scores is None else scores,
    )
    vocabulary.special = _special_ids(file, defaults, count)
    _find_special_tokens(vocabulary)
    _find_ends(vocabulary)
    return vocabulary


def _special_ids(file: GGUFFile, defaults: dict[str, int], count: int) -> dict[str, int]:
    special = {name: i for name, i in defaults.items() if 0 <= i < count}
    for name in ("bos", "eos", "eot", "eom", "unk", "sep", "pad", "mask", *_FILL_IN_TEXTS):
        for key in (_KEY_NAMES.get(name, name), _OLD_KEYS.get(name)):
            value: Any = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count:
                special[name] = value
    return special


def _find_special_tokens(vocabulary: Vocabulary) -> None:
    """Tokens that the metadata does not name are known by their text, and are control tokens whatever the file says."""
    for name, texts in {"eot": _EOT_TEXTS, "eom": _EOM_TEXTS, **_FILL_IN_TEXTS}.items():
        if name in vocabulary.special:
            continue
        found = next((vocabulary.ids[text] for text in texts if text in vocabulary.ids), None)
        if found is not None:
            vocabulary.special[name] = found
            vocabulary.kinds[found] |= TokenKind.CONTROL


def _find_ends(vocabulary: Vocabulary) -> None:
    ids, special = vocabulary.ids, vocabulary.special
    ends = {special[name] for name in ("fim_pad", "fim_rep", "fim_sep") if name in special}
    by_text = {text: ids[text] for text in _END_TEXTS if text in ids}
    for i in by_text.values():
        vocabulary.kinds[i] |= TokenKind.CONTROL
    ends.update(by_text.values())
    ends.update(special[name] for name in ("eos", "eot", "eom") if name in special)
    shown = {ids[text] for text in _ALWAYS_SHOWN if text in ids}

    texts = {vocabulary.pieces[i] for i in ends}
    calls = "<|call|>" in texts or "<|calls|>" in texts
    if calls and "<|end|>" in texts and ("<|return|>" in texts or "<|flush|>" in texts):
        # In these chat formats <|end|> closes one message of several.
        ends.discard(ids["<|end|>"])
        shown.add(ids["<|end|>"])
    if "</s>" in texts and ("<|tool_response>" in texts or "<|plamo:eos|>" in texts):
        ends.discard(ids["</s>"])
        vocabulary.kinds[ids["</s>"]] = TokenKind.NORMAL
    vocabulary.eog_ids = frozenset(ends)
    vocabulary.shown_ids = frozenset(shown)
