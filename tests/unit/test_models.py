"""Architectures as graphs: logits of tiny models against llama.cpp's, and one clear error for every broken file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llamacpp_logits
import numpy as np
import pytest
from batches import one_table, run_prompt
from tiny_models import TinyShape, write_tiny_model

from pyinfer.errors import ModelError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import ApplyRope, Attention, Embed, ExpertMatMul, MatMul, SelectRows
from pyinfer.graph.passes import for_context
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.writer import write_gguf
from pyinfer.runtime.models.registry import ARCHITECTURES, build_graph

pytestmark = pytest.mark.unit


def build(path: Path) -> Graph:
    return for_context(build_graph(GGUFFile.open(path)), llamacpp_logits.N_CTX)


@pytest.mark.parametrize("case", llamacpp_logits.CASES)
def test_logits_equal_llamacpps(case: str, tmp_path: Path) -> None:
    arch, options = llamacpp_logits.CASES[case]
    graph = build(write_tiny_model(tmp_path / "tiny.gguf", arch, "F32", **options))
    stage = ReferenceBackend().open_stage(one_table(graph), StageConfig(n_pages=2, kv_dtype="f32"))
    ours = run_prompt(stage, llamacpp_logits.PROMPT, [1, 0], block_size=16)[llamacpp_logits.ROWS]
    with np.load(llamacpp_logits.DATA) as data:
        theirs = data[case]
    # llama.cpp computes GELU through a table of float16 values; all else is float32
    tolerance = 2e-5 if arch != "gemma3" else 0.02
    np.testing.assert_allclose(ours, theirs, atol=tolerance * theirs.std(), rtol=0)


def test_the_cases_differ_from_each_other() -> None:
    """Else a scaling that is read but not applied would pass."""
    with np.load(llamacpp_logits.DATA) as data:
        assert set(data.files) == set(llamacpp_logits.CASES)
        wide = [
            data[case][-1]
            for case in data.files
            if case.startswith("llama ") and "shape" in llamacpp_logits.CASES[case][1]
        ]
    same = sum(np.abs(a - b).max() < 0.05 for i, a in enumerate(wide) for b in wide[:i])
    assert same == 1  # scale_linear is the old name of linear


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_last_layer_runs_its_feed_forward_for_wanted_rows_only(arch: str, tmp_path: Path) -> None:
    graph = build(write_tiny_model(tmp_path / "m.gguf", arch))
    selected = next(i for i, op in enumerate(graph.ops) if isinstance(op, SelectRows))
    after = [op for op in graph.ops[selected:] if isinstance(op, MatMul | ExpertMatMul)]
    experts, shared = (tuple(f"ffn_{part}_{end}" for part in ("gate", "up", "down")) for end in ("exps", "shexp"))
    feed_forward = {
        "qwen3moe": ("ffn_gate_inp", *experts),
        "qwen2moe": ("ffn_gate_inp", *experts, "ffn_gate_inp_shexp", *shared),
    }.get(arch, ("ffn_gate", "ffn_up", "ffn_down"))
    assert [op.outs[0].name for op in after] == [
        *(f"blk.1.{name}" for name in ("attn_output", *feed_forward)),
        "output",
    ]
    assert all(value.rows == "outputs" for op in graph.ops[selected:] for value in op.outputs)
    assert graph.logits.rows == "outputs" and graph.logits.width == graph.n_vocab == 300


def test_a_tied_output_is_the_embedding_itself(tmp_path: Path) -> None:
    graph = build(write_tiny_model(tmp_path / "m.gguf", shape=TinyShape(tied=True)))
    embed, output = graph.ops[0], graph.ops[-1]
    assert isinstance(embed, Embed) and isinstance(output, MatMul)
    assert output.weights[0] is embed.table


def test_gemma3_alternates_windows_and_rotary_bases(tmp_path: Path) -> None:
    graph = build(write_tiny_model(tmp_path / "m.gguf", "gemma3", shape=TinyShape(n_layers=4)))
    assert [layer.window for layer in graph.kv_layers] == [8, None, 8, None]
    assert [op.rope.base for op in graph.ops if isinstance(op, ApplyRope)] == [1e4, 1e4, 1e6, 1e6] * 2


@pytest.mark.parametrize(("window", "expected"), [(0, None), (8, 8), (511, 511), (512, None), (None, None)])
def test_phi3_has_one_window_in_all_layers(window: int | None, expected: int | None, tmp_path: Path) -> None:
    graph = build(write_tiny_model(tmp_path / "m.gguf", "phi3", metadata={"phi3.attention.sliding_window": window}))
    assert [layer.window for layer in graph.kv_layers] == [expected, expected]


def test_phi3_with_q_k_and_v_apart(tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "m.gguf", "phi3", "Q8_0", vectors={"blk.0.attn_qkv.bias": np.linspace(0, 2, 128, dtype=np.float32)}
    )
    with GGUFFile.open(path) as file:
        tensors = {}
        for name, tensor in file.tensors.items():
            shape, data = tensor.shape, tensor.data if len(tensor.shape) == 2 else tensor.data.reshape(1, -1)
            cuts = {"q": (0, 64), "k": (64, 96), "v": (96, 128)} if "attn_qkv" in name else {"qkv": (0, shape[0])}
            for part, (first, stop) in cuts.items():
                rows = data[first:stop] if len(shape) == 2 else data[:, 4 * first : 4 * stop]
                tensors[name.replace("qkv", part)] = (tensor.codec.name, (stop - first, *shape[1:]), rows)
        write_gguf(tmp_path / "apart.gguf", file.metadata, tensors)
    logits = []
    for each in (path, tmp_path / "apart.gguf"):
        stage = ReferenceBackend().open_stage(one_table(build(each)), StageConfig(n_pages=2, kv_dtype="f32"))
        logits.append(run_prompt(stage, llamacpp_logits.PROMPT, [1, 0], block_size=16))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_head_size_from_key_length(tmp_path: Path) -> None:
    graph = build(write_tiny_model(tmp_path / "m.gguf", "qwen3", shape=TinyShape(head_dim=32)))
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    assert graph.kv_layers[0].head_dim == 32 and attention.q.width == 128
    assert attention.scale == pytest.approx(32**-0.5)


def test_weights_of_different_types(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", codec=lambda name: "F16" if "attn_v" in name else "Q4_K")
    types = {w.codec.name for op in build(path).ops if isinstance(op, MatMul) for w in op.weights}
    assert types == {"F16", "Q4_K"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"arch": "mamba"},
            r"architecture 'mamba' is not known; known: llama, qwen2, qwen2moe, qwen3, qwen3moe, gemma3, phi3",
        ),
        ({"metadata": {"general.architecture": None}}, r"architecture None is not known"),
        ({"metadata": {"llama.block_count": None}}, r"key llama\.block_count is missing"),
        ({"metadata": {"llama.block_count": 2**31 - 1}}, r"2147483647 layers cannot be made of 21 tensors"),
        ({"metadata": {"llama.block_count": 3}}, r"tensor blk\.2\.attn_norm\.weight is missing"),
        ({"metadata": {"llama.block_count": 1}}, r"tensor blk\.1\.\S+ \(and 8 more\) is not part of a llama model"),
        ({"metadata": {"llama.embedding_length": "64"}}, r"embedding_length is '64'; expected an integer"),
        ({"metadata": {"llama.embedding_length": 0}}, r"embedding_length is 0; expected an integer from 1"),
        ({"metadata": {"llama.attention.head_count": True}}, r"head_count is True; expected an integer"),
        ({"metadata": {"llama.attention.head_count": [4, 2]}}, r"head_count differs between layers"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, r"4 heads cannot share 3 key heads"),
        ({"metadata": {"llama.attention.value_length": 32}}, r"values of 32 columns a head beside keys of 16"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, r"epsilon is nan; expected a finite"),
        (
            {"arch": "qwen3", "metadata": {"qwen3.expert_count": 8}},
            r"is 8; qwen3 models with experts are not supported",
        ),
        (
            {"arch": "qwen2", "metadata": {"qwen2.expert_count": 8}},
            r"is 8; qwen2 models with experts are not supported",
        ),
        ({"metadata": {"llama.expert_count": 8}}, r"key llama\.expert_used_count is missing"),
        (
            {"metadata": {"llama.expert_count": 4, "llama.expert_used_count": 5}},
            r"expert_used_count is 5; expected at most the 4 experts there are",
        ),
        (
            {"metadata": {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_gating_func": 2}},
            r"expert_gating_func is 2; supported: 1 \(softmax\)",
        ),
        (
            {
                "metadata": {"llama.expert_count": 4, "llama.expert_used_count": 2},
                "vectors": {"blk.0.ffn_gate.0.weight": np.ones((128, 64), np.float32)},
            },
            r"every expert is a tensor of its own, as in files of early 2024",
        ),
        (
            {"metadata": {"llama.expert_count": 4, "llama.expert_used_count": 2}},
            r"tensor blk\.0\.ffn_gate_inp\.weight is missing",
        ),
        (
            {"shape": TinyShape(n_experts=4), "metadata": {"llama.expert_count": 5}},
            r"tensor blk\.0\.ffn_gate_inp\.weight has shape \(4, 64\); expected \(5, 64\)",
        ),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, r"is 'longrope'; supported: none, linear, yarn"),
        ({"metadata": {"llama.rope.scaling.type": 3}}, r"rope\.scaling\.type is 3; expected a string"),
        (
            {"metadata": {"llama.rope.dimension_count": 18}},
            r"dimension_count is 18; expected an even number of at most 16",
        ),
        ({"metadata": {"llama.rope.freq_base": 0.0}}, r"freq_base is 0\.0; expected a number above 1"),
        ({"vectors": {"rope_freqs.weight": np.zeros(8)}}, r"rope_freqs\.weight holds a factor"),
        ({"vectors": {"rope_freqs.weight": np.ones(7)}}, r"rope_freqs\.weight has shape \(7,\); expected \(8,\)"),
        (
            {
                "arch": "phi3",
                "vectors": {"rope_factors_long.weight": np.ones(8), "rope_factors_short.weight": -np.ones(8)},
            },
            r"rope_factors_short\.weight holds a factor",
        ),
        ({"arch": "phi3", "omit": ("blk.0.attn_qkv.weight",)}, r"tensor blk\.0\.attn_q\.weight is missing"),
        ({"arch": "phi3", "metadata": {"phi3.feed_forward_length": 64}}, r"\(256, 64\); expected \(128, 64\)"),
        ({"vectors": {"blk.0.attn_q.scale": np.ones(1)}}, r"tensor blk\.0\.attn_q\.scale is not part of a llama"),
        ({"vectors": {"blk.0.attn_q.bias": np.ones(3)}}, r"blk\.0\.attn_q\.bias has shape \(3,\); expected \(64,\)"),
        ({"omit": ("blk.1.ffn_down.weight",)}, r"tensor blk\.1\.ffn_down\.weight is missing; a llama model needs it"),
        (
            {"metadata": {"tokenizer.ggml.tokens": ["a"] * 299}},
            r"token_embd\.weight has shape \(300, 64\); expected \(299, 64\)",
        ),
        ({"arch": "gemma3", "metadata": {"gemma3.final_logit_softcapping": 30.0}}, r"final_logit_softcapping is set"),
        (
            {"arch": "gemma3", "metadata": {"gemma3.attention.sliding_window_pattern": [True]}},
            r"sliding_window_pattern has 1 entries; expected one for each of 2 layers",
        ),
    ],
)
def test_broken_files_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "broken.gguf", **options)
    with pytest.raises(ModelError, match=message) as caught:
        build(path)
    assert str(caught.value).startswith("broken.gguf: ") and "\n" not in str(caught.value)


def test_equal_sizes_for_each_layer_are_one_size(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [128, 128]}
    assert len(build(write_tiny_model(tmp_path / "m.gguf", metadata=metadata)).kv_layers) == 2
