"""Passes keep what a graph computes: the reference interpreter runs it before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from batches import one_table, run_prompt
from tiny_models import write_tiny_model

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Add, CombineExperts, Embed, MatMul, Quantize, RMSNorm, Value
from pyinfer.graph.passes import (
    AnyMatMul,
    fuse_projections,
    fuse_residuals,
    is_quantized,
    optimize,
    quantize_activations,
)
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import ARCHITECTURES, build_graph

pytestmark = pytest.mark.unit

PROMPT = np.random.RandomState(3).randint(0, 300, 24).tolist()


def build(path: Path) -> Graph:
    return build_graph(GGUFFile.open(path))


def logits(graph: Graph) -> npt.NDArray[np.float32]:
    stage = ReferenceBackend().open_stage(one_table(graph), StageConfig(n_pages=2, kv_dtype="f32"))
    return run_prompt(stage, PROMPT, [0, 1], block_size=16)


def mixed(name: str) -> str:
    """Float v beside quantized q and k, a float up beside a quantized gate."""
    return "F16" if "attn_v" in name or "ffn_up" in name else "Q8_0"


@pytest.mark.parametrize("codec", ["F32", "Q8_0", mixed])
@pytest.mark.parametrize("rewrite", [fuse_projections, fuse_residuals])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusing_changes_no_logit(arch: str, rewrite: Callable[[Graph], Graph], codec: str, tmp_path: Path) -> None:
    graph = build(write_tiny_model(tmp_path / "m.gguf", arch, codec))
    rewritten = rewrite(graph)
    rewritten.check()
    assert len(rewritten.ops) < len(graph.ops) or (arch == "gemma3" and rewrite is fuse_residuals)
    np.testing.assert_allclose(logits(rewritten), logits(graph), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_projections_of_one_value_become_one_matmul(arch: str, tmp_path: Path) -> None:
    graph = fuse_projections(build(write_tiny_model(tmp_path / "m.gguf", arch)))
    matmuls = [op for op in graph.ops if isinstance(op, AnyMatMul)]
    names = [tuple(w.name.split(".")[-2] for w in op.weights) for op in matmuls]
    layer = [("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",)]
    experts = [("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",)]
    if arch == "qwen3moe":
        layer[2:] = [("ffn_gate_inp",), *experts]
    if arch == "qwen2moe":  # both gates are float
        layer[2:] = [
            ("ffn_gate_inp", "ffn_gate_inp_shexp"),
            *experts,
            ("ffn_gate_shexp", "ffn_up_shexp"),
            ("ffn_down_shexp",),
        ]
    if arch == "phi3":  # parts of one matrix
        layer = [("attn_qkv",) * 3, ("attn_output",), ("ffn_up",) * 2, ("ffn_down",)]
    assert names == [*layer, *layer, ("token_embd" if arch == "gemma3" else "output",)]


def test_residuals_join_the_combination_of_experts(tmp_path: Path) -> None:
    graph = optimize(build(write_tiny_model(tmp_path / "m.gguf", "qwen3moe")))
    assert not any(isinstance(op, Add) for op in graph.ops)
    assert [op.residual is not None for op in graph.ops if isinstance(op, CombineExperts)] == [True, True]


def test_float_and_quantized_weights_are_not_fused(tmp_path: Path) -> None:
    graph = optimize(build(write_tiny_model(tmp_path / "m.gguf", codec=mixed)))
    matmuls = [op for op in graph.ops if isinstance(op, MatMul)]
    assert all(len({is_quantized(w) for w in op.weights}) == 1 for op in matmuls)
    assert [len(op.weights) for op in matmuls][:5] == [2, 1, 1, 1, 1]  # q k; v; output; gate; up
    assert [op.x.dtype for op in matmuls][:5] == ["a8", "f32", "a8", "a8", "f32"]
    # the norms have readers of both kinds: a Quantize follows, and the float readers see the float value
    assert sum(isinstance(op, Quantize) for op in graph.ops) == 5  # two norms a layer, and the selected attention rows


def test_residuals_join_the_matmul_before_them(tmp_path: Path) -> None:
    graph = fuse_residuals(build(write_tiny_model(tmp_path / "m.gguf")))
    assert not any(isinstance(op, Add) for op in graph.ops)
    joined = [op.weights[0].name for op in graph.ops if isinstance(op, MatMul) and op.residual is not None]
    assert joined == [f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_output", "ffn_down")]


def test_a_result_that_something_else_reads_keeps_its_matmul(tmp_path: Path) -> None:
    table = GGUFFile.open(write_tiny_model(tmp_path / "m.gguf", codec="F32")).tensors
    x, y, total, normed = (Value(name, 64) for name in ("x", "y", "total", "normed"))
    out = Value("out", 300)
    square = table["blk.0.attn_q.weight"]
    graph = Graph(
        ops=(
            Embed(x, table["token_embd.weight"]),
            MatMul((y,), x, (square,), (None,)),
            RMSNorm(normed, y, np.ones(64, np.float32), 1e-5),
            Add(total, y, normed),
            MatMul((out,), total, (table["output.weight"],), (None,)),
        ),
        logits=out,
        kv_layers=(),
        n_vocab=300,
        n_embd=64,
        n_ctx_train=512,
    )
    assert fuse_residuals(graph).ops == graph.ops


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("codec", ["Q8_0", "Q4_K", mixed])
def test_quantized_weights_read_int8_activations(arch: str, codec: str, tmp_path: Path) -> None:
    graph = build(write_tiny_model(tmp_path / "m.gguf", arch, codec))
    for rewritten in (quantize_activations(graph), optimize(graph)):
        rewritten.check()
        for op in rewritten.ops:
            others = list(op.inputs)
            if isinstance(op, AnyMatMul):
                assert (op.x.dtype == "a8") == is_quantized(op.weights[0])
                others.remove(op.x)
            assert all(value.dtype in ("f32", "i32") for value in others)
        made = Counter(id(op.x) for op in rewritten.ops if isinstance(op, Quantize))
        assert set(made.values()) <= {1}, "a value is quantized twice"
        exact, rounded = logits(graph), logits(rewritten)
        error = np.abs(rounded - exact)
        assert error.max() > 0 and error.mean() < 0.05 * exact.std()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_producers_write_int8_by_themselves(arch: str, tmp_path: Path) -> None:
    graph = optimize(build(write_tiny_model(tmp_path / "m.gguf", arch)))
    assert [op.x.name for op in graph.ops if isinstance(op, Quantize)] == ["attention.1.outputs"]


@pytest.mark.parametrize("codec", ["F32", "F16", "BF16"])
def test_float_weights_keep_float_activations(codec: str, tmp_path: Path) -> None:
    graph = optimize(build(write_tiny_model(tmp_path / "m.gguf", codec=codec)))
    assert all(value.dtype == "f32" for op in graph.ops for value in op.outputs)


def test_optimizing_twice_changes_nothing(tmp_path: Path) -> None:
    once = optimize(build(write_tiny_model(tmp_path / "m.gguf", codec=mixed)))
    twice = optimize(once)
    assert [(type(op), op.inputs, op.outputs) for op in twice.ops] == [
        (type(op), op.inputs, op.outputs) for op in once.ops
    ]
