"""Perplexity and importance matrix of a real model, against llama.cpp's on the same file and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llamacpp_quantize import ANSWERS, IMATRIX_CHUNKS, IMATRIX_CTX, PERPLEXITY_CHUNKS, PERPLEXITY_CTX, TEXT

from pyinfer.convert.importance_matrix import ImportanceMatrix

pytestmark = pytest.mark.e2e

Cli = Callable[..., tuple[int, str, str]]


def test_perplexity_is_llamacpps(cli: Cli, model_path: Callable[[str], Path]) -> None:
    arguments = ("-f", str(TEXT), "-c", str(PERPLEXITY_CTX), "--chunks", str(PERPLEXITY_CHUNKS), "--json")
    code, output, errors = cli("perplexity", str(model_path("smollm2")), *arguments)
    assert code == 0, errors
    found = json.loads(output)
    assert found["value"] == pytest.approx(json.loads(ANSWERS.read_text())["perplexity smollm2"], rel=0.005)
    assert found["n_tokens"] == PERPLEXITY_CHUNKS * (PERPLEXITY_CTX // 2 - 1)


def test_importances_are_llamacpps(cli: Cli, model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits on the way, so a column may be off by a tenth; most are not."""
    path = tmp_path / "imatrix.gguf"
    arguments = ("-f", str(TEXT), "-o", str(path), "-c", str(IMATRIX_CTX), "--chunks", str(IMATRIX_CHUNKS))
    code, _, errors = cli("imatrix", str(model_path("smollm2")), *arguments)
    assert code == 0, errors
    matrix = ImportanceMatrix.load(path)
    expected = json.loads(ANSWERS.read_text())["imatrix smollm2"]
    assert matrix.sums.keys() == expected.keys()
    assert (matrix.n_chunks, matrix.chunk_size, matrix.datasets) == (IMATRIX_CHUNKS, IMATRIX_CTX, (TEXT.name,))
    off = []
    for name, values in expected.items():
        columns = matrix.columns(name)
        assert columns is not None and matrix.counts[name] == [IMATRIX_CHUNKS * IMATRIX_CTX]
        np.testing.assert_allclose(columns[0, ::96], values, rtol=0.2, atol=0.05 * np.mean(values), err_msg=name)
        off.extend(np.abs(columns[0, ::96] / values - 1))
    assert np.median(off) < 0.02
