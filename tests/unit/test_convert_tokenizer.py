"""Tokenizers of checkpoints: SentencePiece's file, fingerprints of splitting, special tokens, whole vocabularies."""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hf_tokenizers import byte_level_tokenizer, wordpiece_tokenizer
from sentencepiece_file import write_sentencepiece
from special_vocab import ANSWERS, CASES, N_VOCAB, write_case
from tiny_checkpoints import vocabulary_file

from pyinfer.convert.dense_families import BERT, GEMMA3, LLAMA, QWEN2
from pyinfer.convert.family import Family
from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.hf_config import HFConfig
from pyinfer.convert.hf_tokenizer import load_hf_tokenizer
from pyinfer.convert.pretokenizer import FINGERPRINTS, fingerprint
from pyinfer.convert.sentencepiece_model import read_sentencepiece
from pyinfer.convert.special_tokens import special_metadata
from pyinfer.convert.tokenizer_check import check_tokenizer, sample_texts
from pyinfer.convert.vocabulary import vocabulary_metadata
from pyinfer.errors import ConvertError, TokenizerError
from pyinfer.quant.writer import write_gguf
from pyinfer.runtime.pretokenizers import PRE_TOKENIZERS
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[1] / "data"


def folder_with(folder: Path, **files: Any) -> HFCheckpoint:
    """A checkpoint without weights; `tokenizer_json={...}` is the file tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    files.setdefault("config_json", {})
    for name, content in files.items():
        (folder / name.replace("_json", ".json")).write_text(json.dumps(content))
    return weightless(folder)


def weightless(folder: Path) -> HFCheckpoint:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return HFCheckpoint(folder)


def loaded(checkpoint: HFCheckpoint, family: Family, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The vocabulary as a reader of the GGUF sees it, and its keys."""
    metadata = vocabulary_metadata(checkpoint, family, HFConfig(config, {}))
    path = checkpoint.folder / "vocabulary.gguf"
    write_gguf(path, {"general.architecture": family.arch, **metadata}, {})
    return load_tokenizer(path), metadata


def write_tokenizer_model(folder: Path) -> None:
    """The tiny model, without its piece of two spaces, which SentencePiece and `tokenizers` take differently."""
    pieces = json.loads(lzma.decompress((DATA / "tiny_sentencepiece.json.xz").read_bytes()))
    plain = [("<|space|>" if text == "\u2581\u2581" else text, score, kind) for text, score, kind in pieces]
    write_sentencepiece(folder / "tokenizer.model", plain)


def test_pieces_equal_those_that_sentencepiece_reads() -> None:
    expected = json.loads(lzma.decompress((DATA / "tiny_sentencepiece.json.xz").read_bytes()))
    pieces = read_sentencepiece(DATA / "tiny_sentencepiece.model")
    assert [[piece.text, piece.score, int(piece.kind)] for piece in pieces] == expected


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "tokenizer.model", [("<unk>", 0.0, 2)], model_type=1)
    with pytest.raises(ConvertError, match="type 1; only BPE"):
        read_sentencepiece(path)


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", b"bWFnaWM= 0\n", b"\x0a\x02\x0a\x05", b"\x0b", b"\xff" * 20])
def test_a_file_that_is_no_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConvertError, match="SentencePiece"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_fingerprints_of_real_vocabularies() -> None:
    assert FINGERPRINTS[fingerprint(byte_level_tokenizer(vocabulary_file("gpt-2")))] == "gpt-2"
    assert FINGERPRINTS[fingerprint(wordpiece_tokenizer(vocabulary_file("bert-bge")))] == "jina-v2-en"


def test_every_recognized_split_is_known_to_the_runtime() -> None:
    wordpiece = {"bert-bge", "bert-bge-large", "jina-v2-en"}
    unknown = set(FINGERPRINTS.values()) - set(PRE_TOKENIZERS) - wordpiece
    assert not unknown


@pytest.mark.parametrize("case", CASES)
def test_special_tokens_equal_those_of_gguf_py(tmp_path: Path, case: str) -> None:
    expected = json.loads(ANSWERS.read_text())[case]
    write_case(tmp_path, case)
    assert special_metadata(weightless(tmp_path), N_VOCAB) == expected


def test_sentencepiece_with_added_tokens(tmp_path: Path) -> None:
    added = {"300": {"content": "<extra>", "special": False}, "462": {"content": "<|end|>", "special": False}}
    checkpoint = folder_with(
        tmp_path,
        tokenizer_config_json={"added_tokens_decoder": added, "add_prefix_space": False},
        added_tokens_json={"<more>": 461},
    )
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tiny_sentencepiece.model").read_bytes())
    tokenizer, keys = loaded(checkpoint, LLAMA, {"vocab_size": 464})
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"].tolist()
    assert tokens[300] == "<extra>" and types[300] == 4
    assert tokens[460:] == ["[PAD460]", "<more>", "<|end|>", "[PAD463]"]
    assert types[460:] == [5, 4, 3, 5]  # <|end|> looks like a control token
    assert tokens[4] == "  " and types[4] == 4  # user-defined in SentencePiece: matched in plain text
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert tokenizer.n_vocab == 464


def test_sentencepiece_ids_equal_those_of_tokenizers(tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path)
    write_tokenizer_model(tmp_path)
    tokenizer, _ = loaded(checkpoint, LLAMA, {})
    check_tokenizer(tmp_path, lambda text: tokenizer.encode(text, add_special=False), tokenizer.decode, n_texts=200)


def test_scores_from_the_merges_of_a_tokenizer_json(tmp_path: Path) -> None:
    """Newer checkpoints hold no tokenizer.model."""
    source = folder_with(tmp_path / "spm")
    write_tokenizer_model(tmp_path / "spm")
    hf = load_hf_tokenizer(source)
    checkpoint = folder_with(tmp_path / "json")
    hf.save(str(tmp_path / "json" / "tokenizer.json"))
    tokenizer, keys = loaded(checkpoint, LLAMA, {})
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is True
    for text in sample_texts(200):
        assert tokenizer.encode(text, add_special=False) == hf.encode(text, add_special_tokens=False).ids


def test_gemma_adds_no_space(tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, tokenizer_config_json={"add_prefix_space": True})
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tiny_sentencepiece.model").read_bytes())
    tokenizer, keys = loaded(checkpoint, GEMMA3, {})
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert tokenizer.decode(tokenizer.encode("make it", add_special=False)) == "make it"


def test_byte_level_from_either_form(tmp_path: Path) -> None:
    """`tokenizer.json`, and `vocab.json` with `merges.txt`, give the keys that the vocabulary came from."""
    file = vocabulary_file("gpt-2")
    hf = byte_level_tokenizer(file)
    both = {"tokenizer_config_json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}}
    one = folder_with(tmp_path / "one", **both)
    hf.save(str(tmp_path / "one" / "tokenizer.json"))
    added = {"added_tokens_json": {"<|endoftext|>": 50256}}
    two = folder_with(tmp_path / "two", **both, **added)
    hf.model.save(str(tmp_path / "two"))
    for checkpoint in (one, two):
        keys = vocabulary_metadata(checkpoint, QWEN2, HFConfig({"vocab_size": 50304}, {}))
        assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
        assert keys["tokenizer.ggml.tokens"][:50257] == file.require("tokenizer.ggml.tokens", list)
        assert keys["tokenizer.ggml.tokens"][50257:] == [f"[PAD{i}]" for i in range(50257, 50304)]
        assert keys["tokenizer.ggml.merges"] == file.require("tokenizer.ggml.merges", list)


def test_wordpiece_from_either_form(tmp_path: Path) -> None:
    file = vocabulary_file("bert-bge")
    hf = wordpiece_tokenizer(file)
    one = folder_with(tmp_path / "one", tokenizer_config_json={"do_lower_case": True})
    hf.save(str(tmp_path / "one" / "tokenizer.json"))
    two = folder_with(tmp_path / "two", tokenizer_config_json={"do_lower_case": True})
    hf.model.save(str(tmp_path / "two"))
    for checkpoint in (one, two):
        tokenizer, keys = loaded(checkpoint, BERT, {"type_vocab_size": 2})
        assert keys["tokenizer.ggml.tokens"] == file.require("tokenizer.ggml.tokens", list)
        assert keys["tokenizer.ggml.token_type_count"] == 2
        if checkpoint is one:
            encode = functools.partial(tokenizer.encode, add_special=False)
            check_tokenizer(checkpoint.folder, encode, tokenizer.decode, n_texts=100)


def test_a_split_without_a_name_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    checkpoint = folder_with(tmp_path)
    Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConvertError, match=r"has no name in GGUF.*--pre-tokenizer NAME"):
        vocabulary_metadata(checkpoint, QWEN2, HFConfig({}, {}))
    keys = vocabulary_metadata(checkpoint, QWEN2, HFConfig({}, {}), "qwen2")
    assert keys["tokenizer.ggml.pre"] == "qwen2"


def test_a_tokenizer_that_differs_is_found(tmp_path: Path) -> None:
    folder_with(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tiny_sentencepiece.model").read_bytes())
    with pytest.raises(TokenizerError, match="differs from the checkpoint's on"):
        check_tokenizer(tmp_path, lambda text: [1, 2, 3], lambda ids: "", n_texts=3)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    def error(name: str, vocab_size: int = 1000, **files: Any) -> str:
        with pytest.raises(ConvertError) as caught:
            vocabulary_metadata(folder_with(tmp_path / name, **files), LLAMA, HFConfig({"vocab_size": vocab_size}, {}))
        return str(caught.value)

    assert "has no tokenizer" in error("none")
    assert "Mistral's own format" in error("tekken", tekken_json={})
    assert "cannot be read as a tokenizer" in error("broken", tokenizer_json={"model": 3})
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "merges.txt").write_text("a b\n")
    assert "only known from a tokenizer.json" in error(
        "class", vocab_json={"a": 0}, tokenizer_config_json={"tokenizer_class": "FooTokenizer"}
    )
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.model").write_bytes((DATA / "tiny_sentencepiece.model").read_bytes())
    assert "has 460 tokens and the model 100" in error("large", vocab_size=100)
