"""A model's tokenizer, from GGUF metadata alone.

`load_tokenizer` picks the algorithm by `tokenizer.ggml.model`: byte-pair encoding (`gpt2`, `gemma4`, `whitespace`),
SentencePiece BPE (`llama`) or WordPiece (`bert`). Ids equal llama.cpp's, which is what a file's maker tested it with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pyinfer.errors import TokenizerError
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.merge_cache import merge_pairs
from pyinfer.runtime.pretokenizers import PRE_TOKENIZERS, pre_tokenizer_spec
from pyinfer.runtime.special_splitter import SpecialSplitter, SpecialToken
from pyinfer.runtime.tokenizer_bpe import BpeEncoder
from pyinfer.runtime.tokenizer_spm import SpmEncoder
from pyinfer.runtime.tokenizer_wordpiece import WordPieceEncoder
from pyinfer.runtime.vocabulary import TokenKind, Vocabulary, read_vocabulary

_SPACE = "\u2581"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoder(Protocol):
    def encode(self, text: str, after_special: bool) -> list[int]:
        """Ids of text that holds no special tokens."""


@dataclass(frozen=True)
class TokenizerRules:
    """What differs between tokenizers beside the algorithm."""

    add_bos: bool
    add_eos: bool
    end_name: str = "eos"  # the special token that closes a text where add_eos: eos, or sep for BERT
    add_space_prefix: bool = False  # decode drops the first space, which encode has put there
    clean_spaces: bool = False  # decode drops the space before punctuation
    byte_level: bool = False  # pieces are spelled in GPT-2's byte alphabet


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads."""

    def __init__(
        self, vocabulary: Vocabulary, encoder: Encoder, rules: TokenizerRules, specials: list[SpecialToken]
    ) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._splitter = SpecialSplitter(specials)
        self._bytes: dict[int, bytes] = {}
        special = vocabulary.special
        self.rules = rules
        self.n_vocab = len(vocabulary.pieces)
        self.bos_id = special.get("bos")
        self.eos_id = special.get("eos")
        self.eot_id = special.get("eot")
        self.unk_id = special.get("unk")
        self.pad_id = special.get("pad")
        self.eog_ids = vocabulary.eog_ids
        """Every id that ends a generation: end of text, of turn, of message."""
        self.special_ids = frozenset(vocabulary.ids_of_kind(TokenKind.CONTROL | TokenKind.UNKNOWN))
        """Control and unknown tokens: parsed only with `parse_special`."""
        self._hidden = self.special_ids - vocabulary.shown_ids
        self._end_id = special.get(rules.end_name)
        self.add_bos = rules.add_bos and self.bos_id is not None
        self.add_eos = rules.add_eos and self._end_id is not None

    @property
    def bos_token(self) -> str:
        """The piece of `bos_id`; empty if there is none."""
        return "" if self.bos_id is None else self.token_text(self.bos_id)

    @property
    def eos_token(self) -> str:
        """The piece of `eos_id`; empty if there is none."""
        return "" if self.eos_id is None else self.token_text(self.eos_id)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`. `add_special` puts BOS and EOS where the model wants them; `parse_special` reads control
        tokens such as `<|im_start|>` as themselves, so use it only for text that no user wrote. Lone surrogates count
        as U+FFFD.
        """
        if not text.isascii():
            text = _SURROGATE.sub("\ufffd", text)
        out: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            out.append(self.bos_id)
        after_special = True
        for part in self._splitter.split(text, parse_special):
            if isinstance(part, int):
                out.append(part)
                after_special = True
            else:
                out += self._encoder.encode(part, after_special)
                after_special = False
        if add_special and self.add_eos and self._end_id is not None:
            out.append(self._end_id)
        return out

    def split_special(self, text: str) -> list[str | int]:
        """The special tokens that `text` spells, as ids, and the text between them, in order."""
        return self._splitter.split(text, parse_special=True)

    def decode(self, ids: list[int], skip_special: bool = True, clean_spaces: bool | None = None) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves control tokens out, and
        BOS and EOS with them. `clean_spaces` (default: what the model's family does) drops spaces before punctuation:
        " ?" becomes "?".
        """
        first_space = self.rules.add_space_prefix
        if skip_special and self.add_bos and ids and ids[0] == self.bos_id:
            ids, first_space = ids[1:], False
        pieces = [self.shown_bytes(self._checked(i), skip_special) for i in ids]
        if first_space and pieces:
            pieces[0] = pieces[0].removeprefix(b" ")
        text = b"".join(pieces).decode("utf-8", "replace")
        return _clean(text) if (self.rules.clean_spaces if clean_spaces is None else clean_spaces) else text

    def token_text(self, token_id: int) -> str:
        """The raw piece as the file spells it."""
        return self._vocabulary.pieces[self._checked(token_id)]

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for in text, as bytes; control tokens are their own names. None for ids past the end,
        which a model can sample where its output matrix is padded.
        """
        found = self._bytes.get(token_id)
        if found is None:
            found = b"" if token_id >= self.n_vocab else self._spell(self._checked(token_id))
            self._bytes[token_id] = found
        return found

    def shown_bytes(self, token_id: int, skip_special: bool) -> bytes:
        """`token_bytes`, or nothing for a control token where those are skipped."""
        return b"" if skip_special and token_id in self._hidden else self.token_bytes(token_id)

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary (0 to {self.n_vocab - 1})")
        return token_id

    def _spell(self, token_id: int) -> bytes:
        kind = int(self._vocabulary.kinds[token_id])
        piece = self._vocabulary.pieces[token_id]
        if kind & (TokenKind.UNKNOWN | TokenKind.CONTROL | TokenKind.USER_DEFINED):
            return piece.encode("utf-8", "surrogateescape")
        if kind & TokenKind.NORMAL:
            if self.rules.byte_level:
                return b"".join(_BYTE_OF.get(c) or c.encode("utf-8", "surrogateescape") for c in piece)
            return piece.replace(_SPACE, " ").encode("utf-8", "surrogateescape")
        if kind & TokenKind.BYTE and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return b""


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _clean(text: str) -> str:
    text = re.sub(" ([?!.,])", r"\1", text)
    text = text.replace(" ' ", "'")
    return re.sub(" '(?=[sm]|re|ve)", "'", text)


def load_tokenizer(source: str | Path | GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file (a path, or one that is open); TokenizerError if it has none that can be used."""
    if isinstance(source, GGUFFile):
        return _build(source)
    with GGUFFile.open(source) as file:
        return _build(file)


def _build(file: GGUFFile) -> Tokenizer:
    model = file.metadata.get("tokenizer.ggml.model")
    if model == "llama":
        return _build_spm(file)
    if model == "bert":
        return _build_wordpiece(file)
    if model in ("gpt2", "whitespace"):
        return _build_bpe(file, file.metadata.get("tokenizer.ggml.pre"))
    if model == "gemma4":
        return _build_bpe(file, "gemma4")
    if model is None:
        raise TokenizerError(
            "the file names no tokenizer (tokenizer.ggml.model); use a GGUF that was converted with its tokenizer",
            param="tokenizer.ggml.model",
        )
    raise TokenizerError(
        f"tokenizer model '{model}' (tokenizer.ggml.model) is not supported; supported: gpt2, llama, bert, gemma4, "
        "whitespace. Use another model, or give token ids instead of text",
        param="tokenizer.ggml.model",
    )


def _flag(file: GGUFFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}", default)
    return value if isinstance(value, bool) else default


def _build_spm(file: GGUFFile) -> Tokenizer:
    vocabulary = read_vocabulary(file, {"bos": 1, "eos": 2, "unk": 0})
    prefix = _flag(file, "add_space_prefix", True)
    rules = TokenizerRules(
        add_bos=_flag(file, "add_bos_token", True),
        add_eos=_flag(file, "add_eos_token", False),
        add_space_prefix=prefix,
    )
    return Tokenizer(vocabulary, SpmEncoder(vocabulary, prefix), rules, _special_tokens(file, vocabulary))


def _build_wordpiece(file: GGUFFile) -> Tokenizer:
    vocabulary = read_vocabulary(file, {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103})
    lowercase = _flag(file, "normalizer.lowercase", True)
    encoder = WordPieceEncoder(vocabulary, lowercase, _flag(file, "normalizer.strip_accents", lowercase))
    rules = TokenizerRules(
        add_bos=True,
        add_eos=True,
        end_name="sep",
        add_space_prefix=_flag(file, "add_space_prefix", False),
        clean_spaces=True,
    )
    return Tokenizer(vocabulary, encoder, rules, _special_tokens(file, vocabulary))


def _build_bpe(file: GGUFFile, pre: object) -> Tokenizer:
    if pre is None or pre == "":
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(
            "the file does not say how its tokenizer splits text (tokenizer.ggml.pre), so any answer would be a guess; "
            f"convert the model again, or set the key to one of: {known}",
            param="tokenizer.ggml.pre",
        )
    spec = pre_tokenizer_spec(str(pre))
    if pre == "whitespace":
        spec = replace(spec, lowercase=_flag(file, "normalizer.lowercase", False))
    merges = file.metadata.get("tokenizer.ggml.merges")
    if merges is None and spec.merges_optional:
        merges = []
    if not isinstance(merges, list):
        raise TokenizerError(
            "the file holds no merges (tokenizer.ggml.merges); convert the model again", param="tokenizer.ggml.merges"
        )
    vocabulary = read_vocabulary(file, {})
    rules = TokenizerRules(
        add_bos=_flag(file, "add_bos_token", spec.add_bos) or spec.force_bos,
        add_eos=_flag(file, "add_eos_token", False),
        add_space_prefix=_flag(file, "add_space_prefix", False),
        clean_spaces=spec.clean_spaces,
        byte_level=not spec.escape_spaces,
    )
    encoder = BpeEncoder(vocabulary, merge_pairs(merges, file.identity), spec)
    return Tokenizer(vocabulary, encoder, rules, _special_tokens(file, vocabulary))


def _special_tokens(file: GGUFFile, vocabulary: Vocabulary) -> list[SpecialToken]:
    """The tokens that text is cut at; which of them take white space along is known by the model's name only, as in
    llama.cpp.
    """
    name = str(file.metadata.get("general.name", "")).lower()
    pre = str(file.metadata.get("tokenizer.ggml.pre", ""))
    arch = str(file.metadata.get("general.architecture", ""))
    left: frozenset[str] = frozenset()
    strip_right = False
    if any(s in pre for s in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or arch in (
        "nomic-bert-moe",
        "jina-bert-v3",
    ):
        left = frozenset(["<mask>"])
    elif "phi-3" in name or "phi3" in name:
        strip_right = True
    elif "modern-bert" in name:
        left = frozenset(["[MASK]"])
    kinds = TokenKind.CONTROL | TokenKind.USER_DEFINED | TokenKind.UNKNOWN
    is_control = (vocabulary.kinds & int(TokenKind.CONTROL | TokenKind.UNKNOWN)) != 0
    return [
        SpecialToken(
            id=i,
            text=(text := vocabulary.pieces[i]),
            control=bool(is_control[i]),
            strip_left=text in left,
            strip_right=strip_right and text not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for i in vocabulary.ids_of_kind(kinds)
    ]
