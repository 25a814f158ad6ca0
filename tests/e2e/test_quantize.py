"""Quantizing a real model, stories15M: bytes are llama-quantize's, and little is lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import stories15m
from llamacpp_quantize import ANSWERS, EXACT_FILES, TEXT, tensor_digest

from pyinfer.convert.conversion import plan_conversion
from pyinfer.convert.importance_matrix import ImportanceMatrix
from pyinfer.convert.quantize import plan_quantization
from pyinfer.paths import home
from pyinfer.quant.gguf import GGUFFile

pytestmark = pytest.mark.e2e

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("stories")
    folder = stories15m.write_hf_folder(scratch / "stories15M", stories15m.fetch(home() / "tests"))
    plan_conversion(folder, "f32").write(scratch / "f32.gguf")
    return scratch / "f32.gguf"


@pytest.mark.parametrize("name", EXACT_FILES)
def test_files_equal_llama_quantizes(source: Path, tmp_path: Path, name: str) -> None:
    with GGUFFile.open(source) as file:
        plan_quantization(file, name).write(tmp_path / "out.gguf")
    assert tensor_digest(tmp_path / "out.gguf") == json.loads(ANSWERS.read_text())["stories15M files"][name]


def test_importances_bring_a_quantized_model_nearer(cli: Cli, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:8_000])
    matrix, digests = tmp_path / "imatrix.gguf", []
    assert cli("imatrix", str(source), "-f", str(text), "-c", "128", "-o", str(matrix))[0] == 0
    found = {}
    for extra in ((), ("--imatrix", str(matrix))):
        out = tmp_path / "out.gguf"
        code, _, errors = cli("quantize", str(source), str(out), "q3_k_m", "--report", str(text), *extra)
        assert code == 0, errors
        with GGUFFile.open(out) as file:
            found[bool(extra)] = file.metadata["pyinfer.report.kl_divergence"]
        digests.append(hashlib.sha256(out.read_bytes()).digest())
    assert ImportanceMatrix.load(matrix).n_chunks > 10
    assert digests[0] != digests[1]
    assert found[True] < found[False] < 0.5
