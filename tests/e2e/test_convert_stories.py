"""stories15M from a Hugging Face folder: the file is llama.cpp's own, its logits are NumPy's, its text is a story."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import stories15m
from llamacpp_convert import ANSWERS, DIGESTS, N_GENERATED, PROMPT, TYPES, describe, logits_with_llamacpp

from pyinfer import LLM, SamplingParams
from pyinfer.convert.conversion import plan_conversion
from pyinfer.convert.tokenizer_check import check_tokenizer
from pyinfer.paths import home
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.tokenizer import load_tokenizer

pytestmark = pytest.mark.e2e

GREEDY = SamplingParams(temperature=0, max_tokens=N_GENERATED, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> stories15m.Llama2c:
    return stories15m.fetch(home() / "tests")


@pytest.fixture(scope="module")
def converted(model: stories15m.Llama2c, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint as a GGUF of a type, made once."""
    scratch = tmp_path_factory.mktemp("stories")
    folder = stories15m.write_hf_folder(scratch / "stories15M", model)

    def convert(type_name: str) -> Path:
        path = scratch / f"{type_name}.gguf"
        if not path.exists():
            plan_conversion(folder, type_name).write(path)
        return path

    return convert


@pytest.mark.parametrize("type_name", TYPES)
def test_files_equal_those_of_llamacpps_converter(converted: Callable[[str], Path], type_name: str) -> None:
    expected = json.loads(DIGESTS.read_text())[f"stories15M {type_name}"]
    found = describe(converted(type_name))
    assert found["keys"] == expected["keys"]
    assert found["tensors"] == expected["tensors"]


def test_logits_equal_those_of_numpy(converted: Callable[[str], Path], model: stories15m.Llama2c) -> None:
    ids = np.load(ANSWERS)["stories15M f32"].tolist()
    with LLM(str(converted("f32")), kv_cache_dtype="f32") as llm:
        logits = llm.logits(ids)
    np.testing.assert_allclose(logits, model.logits(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("type_name", TYPES)
def test_text_equals_llamacpps(converted: Callable[[str], Path], type_name: str) -> None:
    """A coherent story; in 8 bits the two round differently and may part ways."""
    expected = np.load(ANSWERS)[f"stories15M {type_name}"].tolist()
    with LLM(str(converted(type_name)), kv_cache_dtype="f32") as llm:
        prompt = llm.tokenize(PROMPT)
        assert expected[: len(prompt)] == prompt
        output = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0]
    n_equal = len(prompt) + (8 if type_name == "q8_0" else N_GENERATED)
    assert [*prompt, *output.token_ids][:n_equal] == expected[:n_equal]
    assert "little girl named" in output.text


@pytest.mark.parametrize("type_name", ["q8_0", "q4_k_m"])
def test_quantized_on_the_way(converted: Callable[[str], Path], model: stories15m.Llama2c, type_name: str) -> None:
    """Mean KL divergence from the checkpoint, in nats a token, over a text that the model wrote."""
    ids = np.load(ANSWERS)["stories15M f32"].tolist()
    with LLM(str(converted(type_name)), kv_cache_dtype="f32") as llm:
        found, exact = _log_softmax(llm.logits(ids)), _log_softmax(model.logits(ids))
    divergence = float((np.exp(exact) * (exact - found)).sum(-1).mean())
    assert divergence < {"q8_0": 2e-3, "q4_k_m": 0.04}[type_name]
    codecs = {tensor.codec.name for tensor in GGUFFile.open(converted(type_name)).tensors.values()}
    # rows of 288 columns do not fill a block of 256
    assert codecs == {"q8_0": {"F32", "Q8_0"}, "q4_k_m": {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}}[type_name]


@pytest.mark.parametrize("type_name", [*TYPES, "q4_k_m"])
def test_llamacpp_agrees(converted: Callable[[str], Path], type_name: str) -> None:
    """Mean KL divergence between llama.cpp and pyinfer on the same file, in nats; where there is llama-cpp-python.

    Both round what goes into a matmul, llama.cpp to 16 bits even where weights are BF16.
    """
    pytest.importorskip("llama_cpp")
    ids = np.load(ANSWERS)["stories15M f32"].tolist()
    with LLM(str(converted(type_name)), kv_cache_dtype="f32") as llm:
        ours, theirs = _log_softmax(llm.logits(ids)), _log_softmax(logits_with_llamacpp(converted(type_name), ids))
    divergence = float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
    assert divergence < (1e-6 if type_name in ("f32", "f16") else 3e-3)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def test_shards_of_bfloat16_make_the_same_file(
    converted: Callable[[str], Path], model: stories15m.Llama2c, tmp_path: Path
) -> None:
    folder = stories15m.write_hf_folder(tmp_path / "stories15M", model, "F32", shards=3)
    plan_conversion(folder, "bf16").write(tmp_path / "sharded.gguf")
    assert (tmp_path / "sharded.gguf").read_bytes() == converted("bf16").read_bytes()


def test_tokenizer_equals_tokenizers(converted: Callable[[str], Path], model: stories15m.Llama2c) -> None:
    tokenizer = load_tokenizer(converted("f16"))
    folder = converted("f16").parent / "stories15M"
    check_tokenizer(folder, lambda text: tokenizer.encode(text, add_special=False), tokenizer.decode)
