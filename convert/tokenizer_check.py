"""Is the converted tokenizer the checkpoint's own? Compares both on generated texts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.hf_tokenizer import load_hf_tokenizer
from pyinfer.convert.pretokenizer import TEST_TEXT
from pyinfer.errors import TokenizerError

_MIXED = (
    "the of and to in it's don't WE'LL naïve café über straße Zürich façade hello world HTML5 x86_64 GPT-4 e.g. i.e. "
    "привет мир 你好 世界 こんにちは カタカナ 안녕하세요 مرحبا שלום नमस्ते สวัสดี γειά ελλάδα tiếng Việt "
    "🚀 👩\u200d👩\u200d👧 🇩🇪 ✅ — … « » “quoted” ’tis 3.14159 1,000,000 0x7f 2026-11-20 12:34:56 100% $5 #tag @user "
    "a_b snake_case camelCase C++ C# def f(x): return x**2 if (a!=b) && c||d; [1, 2]} <tag/> a?b=c \\n ``` ~/.bashrc"
)
_WORDS = _MIXED.split(" ")
_GAPS = (" ", " ", " ", " ", "", "  ", "    ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000")
_HANGUL = re.compile("[\uac00-\ud7a3]")


def sample_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts of up to 30 words of many scripts, code, numbers, signs and all kinds of white space; always the same."""
    rng = random.Random(seed)
    yield TEST_TEXT
    for _ in range(count - 1):
        words = rng.choices(_WORDS, k=rng.randint(1, 30))
        text = "".join(word + rng.choice(_GAPS) for word in words)
        yield text if rng.random() < 0.5 else text.strip()


def check_tokenizer(
    folder: Path, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], n_texts: int = 1000
) -> None:
    """TokenizerError at the first text whose ids differ from the checkpoint's `tokenizers`, or whose text does not
    come back as there but for white space, which readers of GGUF clean up by rules of their own.

    `encode` adds no BOS or EOS.
    """
    reference = load_hf_tokenizer(HFCheckpoint(folder))
    is_wordpiece = type(reference.model).__name__ == "WordPiece"
    for text in sample_texts(n_texts):
        if is_wordpiece:  # BERT takes Hangul apart, readers of GGUF do not
            text = _HANGUL.sub("", text)
        wanted = reference.encode(text, add_special_tokens=False).ids
        found = encode(text)
        if found != wanted:
            at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
            raise TokenizerError(
                f"the converted tokenizer differs from the checkpoint's on {text!r}: at token {at} "
                f"{found[at : at + 3]} instead of {wanted[at : at + 3]}; nothing was written"
            )
        expected = reference.decode(wanted, skip_special_tokens=True)
        if "".join(decode(found).split()) != "".join(expected.split()):
            raise TokenizerError(
                f"the converted tokenizer decodes {text!r} as {decode(found)!r}, the checkpoint's as {expected!r}; "
                "nothing was written"
            )
