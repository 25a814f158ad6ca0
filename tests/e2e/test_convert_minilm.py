"""all-MiniLM-L6-v2 from its real folder: the file is llama.cpp's own, and llama.cpp's embeddings of it are right."""

from __future__ import annotations

import json
from pathlib import Path

import minilm
import numpy as np
import pytest
from llamacpp_convert import ANSWERS, DIGESTS, describe

from pyinfer.convert.conversion import plan_conversion
from pyinfer.convert.tokenizer_check import check_tokenizer
from pyinfer.paths import home
from pyinfer.runtime.tokenizer import load_tokenizer

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder() -> Path:
    return minilm.fetch(home() / "tests")


def test_the_file_equals_that_of_llamacpps_converter(folder: Path, tmp_path: Path) -> None:
    plan_conversion(folder, "f32").write(tmp_path / "minilm.gguf")
    expected = json.loads(DIGESTS.read_text())["minilm f32"]
    found = describe(tmp_path / "minilm.gguf")
    assert found["keys"] == expected["keys"]
    assert found["tensors"] == expected["tensors"]
    tokenizer = load_tokenizer(tmp_path / "minilm.gguf")
    check_tokenizer(folder, lambda text: tokenizer.encode(text, add_special=False), tokenizer.decode)


def test_llamacpps_embeddings_of_that_file_equal_the_checkpoints(folder: Path) -> None:
    cosines = (np.load(ANSWERS)["minilm f32"] * minilm.embeddings(folder)).sum(1)
    assert cosines.min() > 0.9999
