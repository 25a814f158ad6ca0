"""Tokenizers of Hugging Face's `tokenizers`, made again from the vocabularies that GGUF files carry.

What a GGUF does not say - the splitting pattern, what is put around a text - is written here as the models' own
`tokenizer.json` has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from pyinfer.quant.gguf import GGUFFile

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How a byte-level tokenizer splits: by a pattern, or by GPT-2's with single digits, or by GPT-2's alone."""

    pattern: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


SPLITS = {
    "gpt-2": Split(),
    "smollm": Split(single_digits=True),
    "qwen2": Split(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"),
    "llama-bpe": Split(
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}", ignore_merges=True, adds_bos=True
    ),
}


def byte_level_tokenizer(file: GGUFFile) -> Tokenizer:
    """The BPE tokenizer of a GGUF whose `tokenizer.ggml.pre` is one of `SPLITS`."""
    split = SPLITS[file.require("tokenizer.ggml.pre", str)]
    tokens = file.require("tokenizer.ggml.tokens", list)
    types = file.require("tokenizer.ggml.token_type", list)
    merges = [merge.split(" ") for merge in file.require("tokenizer.ggml.merges", list)]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    tokenizer = Tokenizer(BPE(vocab, [(a, b) for a, b in merges], ignore_merges=split.ignore_merges))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for i, kind in enumerate(types):
        if kind in (3, 4):
            tokenizer.add_tokens([AddedToken(tokens[i], special=kind == 3, normalized=False)])
    if split.adds_bos:
        bos = file.require("tokenizer.ggml.bos_token_id", int)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def wordpiece_tokenizer(file: GGUFFile) -> Tokenizer:
    """BERT's tokenizer, lower case, of a GGUF with `tokenizer.ggml.model` 'bert'."""
    types = file.require("tokenizer.ggml.token_type", list)
    tokens = [
        token if types[i] == 3 else token[1:] if token.startswith("\u2581") else "##" + token
        for i, token in enumerate(file.require("tokenizer.ggml.tokens", list))
    ]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    for i, kind in enumerate(types):
        if kind == 3:
            tokenizer.add_tokens([AddedToken(tokens[i], special=True, normalized=False)])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer
