"""Every family from a tiny random checkpoint of transformers: its logits, and llama.cpp's own file of it.

Needs torch, transformers and sentencepiece; the comparison of files needs llama.cpp's sources too, in the folder that
LLAMA_CPP_SOURCES names, and the logits of architectures that pyinfer does not run need llama-cpp-python.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from llamacpp_convert import convert_with_llamacpp, logits_with_llamacpp
from tiny_checkpoints import CASES, write_checkpoint

from pyinfer import LLM
from pyinfer.convert.conversion import plan_conversion
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import ARCHITECTURES

pytestmark = [pytest.mark.e2e, pytest.mark.large]

SOURCES = os.environ.get("LLAMA_CPP_SOURCES")
# What differs from llama.cpp's file, by case; docs/convert.md says why.
DIFFERENT_TENSORS = {"llama3": {"rope_freqs.weight"}}
NOT_IN_LLAMACPP = {"phi3 window": "llama.cpp lets phi3 see everything before"}
LLAMACPP_ROUNDING = {"gemma3": 1e-2, "bert": 2e-2}  # its GELU is a table of float16


@dataclass(frozen=True)
class Made:
    """A checkpoint, our file of it, and what transformers computes for `ids`."""

    folder: Path
    gguf: Path
    ids: list[int]
    expected: npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=CASES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], Path]
) -> tuple[str, Made]:
    pytest.importorskip("transformers")
    case: str = request.param
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    ids, expected = write_checkpoint(folder, case, lambda: GGUFFile.open(model_path("qwen2.5-coder-1.5b")))
    plan_conversion(folder, "f32").write(folder / "tiny.gguf")
    return case, Made(folder, folder / "tiny.gguf", ids, expected)


def test_logits_equal_those_of_transformers(made: tuple[str, Made]) -> None:
    case, model = made
    if GGUFFile.open(model.gguf).metadata["general.architecture"] not in ARCHITECTURES or not CASES[case].runs_here:
        pytest.skip("pyinfer does not run this architecture")
    with LLM(str(model.gguf), n_ctx=CASES[case].n_ctx, kv_cache_dtype="f32") as llm:
        np.testing.assert_allclose(llm.logits(model.ids), model.expected, atol=1e-3, rtol=0)


def test_llamacpps_logits_of_our_file_equal_those_of_transformers(made: tuple[str, Made]) -> None:
    case, model = made
    pytest.importorskip("llama_cpp")
    if case in NOT_IN_LLAMACPP:
        pytest.skip(NOT_IN_LLAMACPP[case])
    found = _embed(model) if case == "bert" else logits_with_llamacpp(model.gguf, model.ids, CASES[case].n_ctx)
    np.testing.assert_allclose(found, model.expected, atol=LLAMACPP_ROUNDING.get(case, 1e-3), rtol=0)


@pytest.mark.skipif(not SOURCES, reason="LLAMA_CPP_SOURCES names no folder")
@pytest.mark.parametrize("type_name", ["f32", "bf16"])
def test_files_equal_those_of_llamacpps_converter(made: tuple[str, Made], type_name: str, tmp_path: Path) -> None:
    case, model = made
    plan_conversion(model.folder, type_name).write(tmp_path / "ours.gguf")
    convert_with_llamacpp(Path(str(SOURCES)), model.folder, tmp_path / "theirs.gguf", type_name)
    ours, theirs = GGUFFile.open(tmp_path / "ours.gguf"), GGUFFile.open(tmp_path / "theirs.gguf")
    assert set(ours.metadata) == set(theirs.metadata)
    for key, value in theirs.metadata.items():
        assert type(ours.metadata[key]) is type(value), key
        assert np.array_equal(ours.metadata[key], value), key
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        mine = ours.tensors[name]
        assert (mine.codec, mine.shape) == (tensor.codec, tensor.shape), name
        if name in DIFFERENT_TENSORS.get(case, ()):
            np.testing.assert_allclose(mine.dequantize(), tensor.dequantize(), rtol=1e-6)
        else:
            assert np.array_equal(mine.data, tensor.data), name


def _embed(model: Made) -> npt.NDArray[np.float32]:
    """The last layer's rows, without pooling."""
    import llama_cpp

    runner = llama_cpp.Llama(
        str(model.gguf),
        n_ctx=256,
        n_threads=1,
        verbose=False,
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE,
    )
    context, width = runner._ctx.ctx, model.expected.shape[1]
    runner._batch.set_batch(model.ids, 0, True)
    assert llama_cpp.llama_encode(context, runner._batch.batch) == 0
    rows = [llama_cpp.llama_get_embeddings_ith(context, i) for i in range(len(model.ids))]
    return np.array([np.ctypeslib.as_array(row, (width,)) for row in rows], np.float32)
