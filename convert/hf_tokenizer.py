"""A checkpoint's tokenizer as an object of Hugging Face's `tokenizers`, whichever files it is stored in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.sentencepiece_model import Piece, PieceKind, read_sentencepiece
from pyinfer.convert.vocabulary_table import added_tokens
from pyinfer.errors import ConvertError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How the tokenizers split that come without a tokenizer.json: class -> pattern before the bytes; None: GPT-2's own.
_PATTERNS = {
    "GPT2Tokenizer": None,
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


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
    if checkpoint.has("tokenizer.model"):
        return _from_sentencepiece(checkpoint)
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
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in read_merges(checkpoint))]
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


def _from_sentencepiece(checkpoint: HFCheckpoint) -> Tokenizer:
    """The same BPE over characters as transformers makes it: a merge for every way to put a piece together."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces = read_sentencepiece(checkpoint.folder / "tokenizer.model")
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == PieceKind.UNKNOWN), None)
    tokenizer = Tokenizer(BPE(vocab, _merges_of(pieces, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    is_gemma = str(checkpoint.config.get("model_type")).startswith("gemma")
    prepend = [] if is_gemma else [normalizers.Prepend("\u2581")]
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = {i: (p.text, p.kind == PieceKind.CONTROL) for i, p in enumerate(pieces) if p.kind in (3, 4)}
    added |= {i: (entry["content"], bool(entry.get("special"))) for i, entry in added_tokens(checkpoint).items()}
    for _, (text, is_special) in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(text, special=is_special, normalized=False)])
    return tokenizer


def _merges_of(pieces: list[Piece], vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for piece in pieces:
        splits = [(piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text))]
        known = [split for split in splits if split[0] in vocab and split[1] in vocab]
        known.sort(key=lambda split: (vocab[split[0]], vocab[split[1]]))
        merges += [(piece.score, *split) for split in known]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def read_merges(checkpoint: HFCheckpoint) -> list[str]:
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
