"""Ids and text equal llama.cpp's: its own test vectors, and random strings that its library was asked about.

tests/data/vocab/llamacpp.json.xz: `texts`, and for each vocabulary `vectors` (text, ids; from llama.cpp's models/
folder), `plain` and `special` (ids of each text without and with add_special and parse_special), `decode` (ids, text
without and with control tokens). tests/data/vocab/pre_tokenizers.json.xz: `texts`, and `ids` by pre-tokenizer over
the vocabulary of all pairs of bytes.
"""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from vocabularies import DATA, all_pairs, real_vocabulary

from pyinfer.runtime.pretokenizers import PRE_TOKENIZERS

pytestmark = pytest.mark.unit

VOCABULARIES = ("gpt-2", "deepseek-coder", "llama-spm", "bert-bge")


@functools.cache
def data(name: str) -> Any:
    return json.loads(lzma.decompress((DATA / f"{name}.json.xz").read_bytes()))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vectors(name: str) -> None:
    tokenizer = real_vocabulary(name)
    vectors = data("llamacpp")[name]["vectors"]
    assert len(vectors) == 46
    for text, ids in vectors:
        assert tokenizer.encode(text, add_special=False) == ids, text


@pytest.mark.parametrize("name", VOCABULARIES)
def test_random_texts(name: str) -> None:
    tokenizer = real_vocabulary(name)
    expected = data("llamacpp")[name]
    for text, plain, special in zip(data("llamacpp")["texts"], expected["plain"], expected["special"], strict=True):
        assert tokenizer.encode(text, add_special=False, parse_special=False) == plain, text
        assert tokenizer.encode(text, add_special=True, parse_special=True) == special, text


@pytest.mark.parametrize("name", VOCABULARIES)
def test_decode(name: str) -> None:
    tokenizer = real_vocabulary(name)
    for ids, without, whole in data("llamacpp")[name]["decode"]:
        assert tokenizer.decode(ids) == without, ids
        assert tokenizer.decode(ids, skip_special=False) == whole, ids


@pytest.mark.parametrize("name", VOCABULARIES)
def test_special_ids(name: str) -> None:
    tokenizer = real_vocabulary(name)
    expected = data("llamacpp")[name]
    assert sorted(tokenizer.eog_ids) == expected["eog"]
    assert (-1 if tokenizer.bos_id is None else tokenizer.bos_id) == expected["bos"]
    assert (-1 if tokenizer.eos_id is None else tokenizer.eos_id) == expected["eos"]


@pytest.mark.parametrize("pre", sorted(data("pre_tokenizers")["ids"]))
def test_pre_tokenizers(pre: str, tmp_path: Path) -> None:
    tokenizer = all_pairs(tmp_path, pre)
    for text, ids in zip(data("pre_tokenizers")["texts"], data("pre_tokenizers")["ids"][pre], strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, text


def test_every_byte_level_pre_tokenizer_is_covered() -> None:
    asked = {id(PRE_TOKENIZERS[name]) for name in data("pre_tokenizers")["ids"]}
    assert {id(spec) for spec in PRE_TOKENIZERS.values() if spec.byte_level} == asked
