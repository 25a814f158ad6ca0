"""Vocabularies for tests of the tokenizer: real ones that lie compressed in tests/data/vocab, and made-up ones."""

from __future__ import annotations

import functools
import lzma
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyinfer.quant.writer import write_gguf
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[1] / "data" / "vocab"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@functools.cache
def real_vocabulary(name: str) -> Tokenizer:
    """The tokenizer of tests/data/vocab/NAME.gguf.xz, a vocabulary file of llama.cpp's own tests."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.gguf"
        path.write_bytes(lzma.decompress((DATA / f"{name}.gguf.xz").read_bytes()))
        return load_tokenizer(path)


def made_up(folder: Path, model: str, tokens: Sequence[tuple[str, int]], **metadata: Any) -> Tokenizer:
    """A tokenizer of (piece, type) pairs; `metadata` gives further `tokenizer.ggml.` keys, `name` the model's name."""
    keys: dict[str, Any] = {"general.architecture": "llama", "general.name": metadata.pop("name", "made up")}
    keys["tokenizer.ggml.model"] = model
    keys["tokenizer.ggml.tokens"] = [piece for piece, _ in tokens]
    keys["tokenizer.ggml.token_type"] = [kind for _, kind in tokens]
    keys.update({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    return load_tokenizer(_write(folder, keys))


def _write(folder: Path, keys: Mapping[str, Any]) -> Path:
    path = folder / "vocabulary.gguf"
    write_gguf(path, keys, {})
    return path


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def all_pairs(folder: Path, pre: str) -> Tokenizer:
    """All bytes and all pairs of bytes, with a merge for each pair in a scattered order: the ids show where words
    were cut.
    """
    alphabet = byte_alphabet()
    order = sorted(range(65536), key=lambda n: n * 40503 % 65537)
    pairs = [(alphabet[n >> 8], alphabet[n & 255]) for n in order]
    return made_up(
        folder,
        "gpt2",
        [(c, NORMAL) for c in alphabet] + [(a + b, NORMAL) for a, b in pairs],
        pre=pre,
        merges=[f"{a} {b}" for a, b in pairs],
    )
