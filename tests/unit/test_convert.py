"""Conversions of made-up checkpoints: transforms, types, what is refused, and a file that is whole or not there."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from llamacpp_convert import DIGESTS, describe
from made_up_checkpoint import HEADS, HIDDEN, KV_HEADS, VOCAB, Tensors, decoder_tensors, write_checkpoint
from made_up_experts import N_EXPERTS, STORED, expert_tensors, write_mixtral

from pyinfer.convert.conversion import plan_conversion
from pyinfer.convert.families import FAMILIES, family_of
from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.errors import ConfigError, ConvertError
from pyinfer.quant.gguf import GGUFFile

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def converted(folder: Path, type_name: str = "f32") -> GGUFFile:
    path = folder / "out.gguf"
    plan_conversion(folder, type_name).write(path)
    return GGUFFile.open(path)


def values(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    return file.tensors[name].dequantize()


def test_q_and_k_of_llama_pair_neighbours(tmp_path: Path) -> None:
    """Row 2j of a head is its row j, row 2j + 1 is its row j + half a head; biases go along."""
    tensors = decoder_tensors(biases=True)
    file = converted(write_checkpoint(tmp_path, tensors))
    for name in ("weight", "bias"):
        for part, n_heads in (("q", HEADS), ("k", KV_HEADS)):
            source = tensors[f"model.layers.1.self_attn.{part}_proj.{name}"]
            head = len(source) // n_heads
            expected = [source[h * head + j // 2 + j % 2 * head // 2] for h in range(n_heads) for j in range(head)]
            np.testing.assert_array_equal(values(file, f"blk.1.attn_{part}.{name}"), np.array(expected))
        np.testing.assert_array_equal(
            values(file, f"blk.1.attn_v.{name}"), tensors[f"model.layers.1.self_attn.v_proj.{name}"]
        )


def test_rows_are_the_same_in_any_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path)
    converted(folder)
    whole = (tmp_path / "out.gguf").read_bytes()
    monkeypatch.setattr("pyinfer.convert.tensor_source._CHUNK_WEIGHTS", 5 * HIDDEN)
    converted(folder)
    assert (tmp_path / "out.gguf").read_bytes() == whole


def test_norms_of_gemma_count_from_one(tmp_path: Path) -> None:
    more = ("self_attn.q_norm", "self_attn.k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    tensors = decoder_tensors(norms=more)
    folder = write_checkpoint(
        tmp_path,
        tensors,
        architecture="Gemma3ForCausalLM",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        rope_theta=None,
    )
    file = converted(folder)
    for source, target in (("norm", "output_norm"), ("layers.1.self_attn.q_norm", "blk.1.attn_q_norm")):
        np.testing.assert_array_equal(
            values(file, f"{target}.weight"), tensors[f"model.{source}.weight"] + np.float32(1)
        )
    np.testing.assert_array_equal(
        values(file, "blk.0.attn_q.weight"), tensors["model.layers.0.self_attn.q_proj.weight"]
    )
    assert "output.weight" not in file.tensors  # tied, although the checkpoint holds one
    assert file.metadata["gemma3.attention.sliding_window"] == 32
    assert file.metadata["gemma3.rope.freq_base"] == 1e6 and file.metadata["gemma3.rope.freq_base_swa"] == 1e4


def test_windows_that_are_not_every_sixth_layer(tmp_path: Path) -> None:
    more = ("self_attn.q_norm", "self_attn.k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    types = ["full_attention", "sliding_attention"]
    folder = write_checkpoint(
        tmp_path,
        decoder_tensors(norms=more),
        architecture="Gemma3ForCausalLM",
        head_dim=16,
        query_pre_attn_scalar=16,
        layer_types=types,
    )
    pattern = converted(folder).metadata["gemma3.attention.sliding_window_pattern"]
    assert pattern.tolist() == [False, True]


def test_a_text_model_inside_of_one_that_sees(tmp_path: Path) -> None:
    more = ("self_attn.q_norm", "self_attn.k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    tensors = {f"language_model.{name}": value for name, value in decoder_tensors(head=False, norms=more).items()}
    tensors["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    text = {
        "hidden_size": HIDDEN,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "vocab_size": VOCAB,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    folder = write_checkpoint(
        tmp_path, tensors, architecture="Gemma3ForConditionalGeneration", text_config=text, rope_theta=None
    )
    plan = plan_conversion(folder, "f32")
    assert plan.metadata["gemma3.rope.scaling.type"] == "linear" and plan.metadata["gemma3.rope.scaling.factor"] == 8
    assert plan.notes == ("1 tensors of the checkpoint are not part of the text model and are left out",)


def test_llama3_factors_follow_their_definition(tmp_path: Path) -> None:
    """Waves shorter than context / 4 stay, longer than the context are stretched by 8, between is smooth."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    folder = write_checkpoint(tmp_path, rope_scaling=rope, head_dim=32)
    factors = plan_conversion(folder, "f32").tensors["rope_freqs.weight"].chunks
    found = b"".join(chunk.tobytes() for chunk in factors())
    for i, factor in enumerate(np.frombuffer(found, np.float32)):
        wave = 2 * math.pi * 10000.0 ** (2 * i / 32)
        if wave < 16:
            assert factor == 1
        elif wave > 64:
            assert factor == 8
        else:
            smooth = (64 / wave - 1) / 3
            assert factor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("type_name", "codec"), [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_types(tmp_path: Path, dtype: str, type_name: str, codec: str) -> None:
    tensors = decoder_tensors()
    file = converted(write_checkpoint(tmp_path, tensors, dtype), type_name)
    for name, tensor in file.tensors.items():
        assert tensor.codec.name == (codec if len(tensor.shape) == 2 else "F32"), name
    tolerance = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2}[dtype] + {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02}[
        codec
    ]
    np.testing.assert_allclose(
        values(file, "blk.0.ffn_up.weight"), tensors["model.layers.0.mlp.up_proj.weight"], atol=tolerance * 0.5
    )


def test_auto_is_the_checkpoints_own_type(tmp_path: Path) -> None:
    for dtype, expected in (("BF16", "BF16"), ("F16", "F16"), ("F32", "F16")):
        assert plan_conversion(write_checkpoint(tmp_path / dtype, dtype=dtype)).file_type.name == expected


def test_tied_embeddings_and_missing_heads(tmp_path: Path) -> None:
    tied = write_checkpoint(tmp_path / "tied", decoder_tensors(head=False), tie_word_embeddings=True)
    assert "output.weight" not in plan_conversion(tied, "f32").tensors
    untied = write_checkpoint(tmp_path / "untied", decoder_tensors(head=False))
    with pytest.raises(ConvertError, match=r"lm_head\.weight is missing"):
        plan_conversion(untied, "f32")
    bare = {name.removeprefix("model."): value for name, value in decoder_tensors(head=False).items()}
    headless = write_checkpoint(tmp_path / "headless", bare, architecture="LlamaModel")
    assert "output.weight" not in plan_conversion(headless, "f32").tensors


def test_rows_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    tensors = decoder_tensors(head=False)
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate([table, table[:20]])
    file = converted(write_checkpoint(tmp_path, tensors, tie_word_embeddings=True))
    np.testing.assert_array_equal(values(file, "token_embd.weight"), table)


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    """Many fine-tuned models name a pad token that their embedding has no row for."""
    folder = write_checkpoint(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": VOCAB}))
    plan = plan_conversion(folder, "f32")
    assert len(plan.metadata["tokenizer.ggml.tokens"]) == VOCAB
    assert plan.notes == ("1 added tokens that the model has no row for are left out, such as '<pad>'",)


def test_name_and_sampling_defaults(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "Tiny-Story-1B")
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 7, "temperature": 0.5}))
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# Tiny\n")
    keys = plan_conversion(folder, "f32").metadata
    assert keys["general.sampling.top_k"] == 7 and keys["general.sampling.temp"] == 0.5
    assert keys["general.license"] == "mit" and keys["general.languages"] == ["en"]
    assert plan_conversion(folder, "f32", name="Other").metadata["general.name"] == "Other"
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ConvertError, match=r"model card \(README\.md\) cannot be read"):
        plan_conversion(folder, "f32")


def _without(name: str) -> Tensors:
    tensors = decoder_tensors()
    del tensors[name]
    return tensors


def _with(name: str, value: npt.NDArray[Any]) -> Tensors:
    return {**decoder_tensors(), name: value.astype(np.float32)}


def _config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write_checkpoint(folder, **changes)


def _tensors(tensors: Tensors) -> Callable[[Path], object]:
    return lambda folder: write_checkpoint(folder, tensors)


_UP = "model.layers.1.mlp.up_proj.weight"
_DYNAMIC, _LINEAR = {"type": "dynamic", "factor": 2.0}, {"type": "linear"}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (_config(architecture="FooForCausalLM"), "'FooForCausalLM' cannot be converted; known: Llama"),
    "activation": (_config(hidden_act="relu"), "activation 'relu' is not what GGUF's 'llama' computes (silu)"),
    "quantized": (_config(quantization_config={"quant_method": "gptq"}), "quantized with 'gptq'"),
    "rope": (_config(rope_scaling=_DYNAMIC), "rope type 'dynamic' is not supported"),
    "partial rope": (_config(partial_rotary_factor=0.5, model_type="llama"), "partial rotary embedding"),
    "rope of another family": (
        _config(rope_scaling={"type": "llama3", "factor": 8.0}, architecture="Qwen2ForCausalLM"),
        "rope type 'llama3' is not supported here; supported: default, linear, yarn",
    ),
    "attention scale": (_config(architecture="Gemma3ForCausalLM", head_dim=16), "is 256; GGUF's gemma3 has 16"),
    "rope factor": (_config(rope_scaling=_LINEAR), "rope setting 'factor' is None"),
    "size": (_config(hidden_size="64"), "'hidden_size' is '64'; expected a positive integer"),
    "missing size": (_config(num_hidden_layers=None), "'num_hidden_layers' is None"),
    "missing tensor": (_tensors(_without(_UP)), f"tensor {_UP} is missing"),
    "unknown tensor": (_tensors(_with("model.x.weight", np.ones(4))), "tensor model.x.weight is not part of a llama"),
    "layer too many": (_config(num_hidden_layers=1), "more) is not part of a llama model"),
    "shape": (_tensors(_with("model.norm.weight", np.ones((2, 2, 2)))), "expected a vector or a matrix"),
    "heads": (_config(num_attention_heads=7), "64 rows do not part into 7 heads"),
    "rows": (_config(vocab_size=400), "'vocab_size' is 400, and the tensors allow for 300 at most"),
    "layers": (_config(num_hidden_layers=10**6), "'num_hidden_layers' is 1000000, and the tensors allow for"),
    "columns": (_config(hidden_size=32), "has 64 columns and config.json's 'hidden_size' is 32"),
    "positions": (
        _config(architecture="BertModel", hidden_act="gelu", position_embedding_type="relative_key"),
        "'position_embedding_type' is 'relative_key'",
    ),
    "tokens": (_config(vocab_size=100), "has 286 tokens and the model 100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_are_refused(tmp_path: Path, case: str) -> None:
    write, problem = REFUSED[case]
    write(tmp_path)
    with pytest.raises(ConvertError, match=re.escape(problem)):
        plan_conversion(tmp_path, "f32")


@pytest.mark.parametrize(
    ("value", "type_name", "problem"),
    [(np.nan, "f32", "NaN or infinite"), (np.inf, "bf16", "NaN or infinite"), (1e5, "f16", "beyond float16's 65504")],
)
def test_weights_that_no_file_should_hold(tmp_path: Path, value: float, type_name: str, problem: str) -> None:
    weight = decoder_tensors()["model.layers.0.mlp.up_proj.weight"]
    weight[3, 5] = value
    folder = write_checkpoint(tmp_path / "in", _with("model.layers.0.mlp.up_proj.weight", weight))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ConvertError, match=problem):
        plan_conversion(folder, type_name).write(out / "model.gguf")
    assert not list(out.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_conversion(write_checkpoint(tmp_path / "in"), "f32")
    with pytest.raises(ConvertError, match="is no folder to write to"):
        plan.write(tmp_path / "none" / "model.gguf")
    with pytest.raises(ConvertError, match="is a folder; name the file"):
        plan.write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: _Usage())
        with pytest.raises(ConvertError, match=r"needs [0-9,]+ bytes and the disk has 1,000 free"):
            plan.write(tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


class _Usage:
    free = 1000


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_conversion(write_checkpoint(tmp_path / "in"), "f32")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.gguf").write_bytes(b"older")

    def fill(done: int) -> None:
        if done > plan.n_bytes // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ConvertError, match="cannot be written: No space left on device; nothing is left"):
        plan.write(out / "model.gguf", fill)
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    assert (out / "model.gguf").read_bytes() == b"older"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle(tmp_path: Path, how: signal.Signals) -> None:
    write_checkpoint(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pyinfer.convert.conversion import plan_conversion\n"
        "def on_bytes(done):\n"
        "    print(done, flush=True)\n"
        "    time.sleep(60)\n"
        "plan_conversion(sys.argv[1], 'f32').write(Path(sys.argv[2]), on_bytes)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "in"), str(out / "model.gguf")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert int(process.stdout.readline()) > 0
    process.send_signal(how)
    process.wait(30)
    process.stdout.close()
    deadline = time.monotonic() + 5
    while list(out.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    names = [path.name for path in out.iterdir()]
    # where files must have names from the start, a killed process leaves a hidden part behind
    assert names == [] or (how == signal.SIGKILL and all(name.endswith(".part") for name in names))


@pytest.mark.parametrize("case", STORED)
def test_experts_are_stacked_as_llamacpps_converter_does(tmp_path: Path, case: str) -> None:
    write, type_name = STORED[case]
    found = describe(converted(write(tmp_path / "tiny"), type_name).path)
    assert found == json.loads(DIGESTS.read_text())[case]


def test_experts_are_stacked_in_any_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_mixtral(tmp_path)
    tensors = expert_tensors("MixtralForCausalLM")
    for chunk in (64, 7 * 64, 200 * 64, 10**6):
        monkeypatch.setattr("pyinfer.convert.tensor_source._CHUNK_WEIGHTS", chunk)
        file = converted(folder)
        for part, source in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            stacked = values(file, f"blk.1.ffn_{part}_exps.weight")
            assert len(stacked) == N_EXPERTS
            for e, matrix in enumerate(stacked):
                np.testing.assert_array_equal(
                    matrix, tensors[f"model.layers.1.block_sparse_moe.experts.{e}.{source}.weight"]
                )


def test_experts_that_are_refused(tmp_path: Path) -> None:
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors = expert_tensors("MixtralForCausalLM")
    options: dict[str, Any] = {"architecture": "MixtralForCausalLM", "num_local_experts": N_EXPERTS}
    write_checkpoint(tmp_path / "a", {name: t for name, t in tensors.items() if name != expert}, **options)
    with pytest.raises(ConvertError, match=f"tensor {expert} is missing"):
        plan_conversion(tmp_path / "a")
    write_checkpoint(tmp_path / "b", {**tensors, expert: tensors[expert][:32]}, **options)
    with pytest.raises(
        ConvertError, match=r"experts\.3\.w2\.weight is F32 \(32, 96\), and .*0\.w2\.weight is F32 \(64, 96\)"
    ):
        plan_conversion(tmp_path / "b")
    write_checkpoint(tmp_path / "c", tensors, **{**options, "num_local_experts": 4})
    with pytest.raises(ConvertError, match=r"experts\.4\.w1\.weight \(and 5 more\) is not part of a llama model"):
        plan_conversion(tmp_path / "c")
    options = {"architecture": "Qwen3MoeForCausalLM", "num_experts": N_EXPERTS}
    for more, problem in (
        ({"norm_topk_prob": False}, "'norm_topk_prob' is False; GGUF's model of this kind has True"),
        ({"norm_topk_prob": True, "mlp_only_layers": [0]}, "some layers are without experts"),
        ({"norm_topk_prob": True, "num_experts": 10**6}, "'num_experts' is 1000000, and the tensors allow for"),
    ):
        write_checkpoint(tmp_path / "d", expert_tensors("Qwen3MoeForCausalLM"), **{**options, **more})
        with pytest.raises(ConvertError, match=problem):
            plan_conversion(tmp_path / "d")


def test_every_family_is_found_by_its_architectures(tmp_path: Path) -> None:
    for family in FAMILIES:
        for name in family.hf_architectures:
            write_checkpoint(tmp_path, architecture=name)
            assert family_of(HFCheckpoint(tmp_path)) is family


def test_command(tmp_path: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "Tiny", sliding_window=16)
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("convert", str(folder), "--type", "q8_0", "--verify-tokenizer")
    assert code == 0, err
    assert "Tiny-Q8_0.gguf" in out and "no sliding window" in err and "1,000 texts have the same ids" in err
    assert GGUFFile.open(tmp_path / "Tiny-Q8_0.gguf").metadata["general.file_type"] == 7
    code, out, _ = cli("convert", str(folder), "-o", "dry.gguf", "--type", "f32", "--dry-run")
    assert code == 0 and "would write" in out and not (tmp_path / "dry.gguf").exists()
    code, _, err = cli("convert", str(tmp_path), "-o", "x.gguf")
    assert code == 1 and "has no config.json" in err
    code, _, err = cli("convert", str(folder), "--type", "q9")
    assert code == 2 and "'q9' is not a type" in err


def test_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'q9' is not a type to quantize to"):
        plan_conversion(write_checkpoint(tmp_path), "q9")
