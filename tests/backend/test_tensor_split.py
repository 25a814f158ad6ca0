"""Tensor parallelism simulated by threads: n ranks compute what one device does, and hold an nth of it each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch, run_prompt
from rank_sum import RankSum
from tiny_models import TinyShape

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import AllReduce
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceStage
from pyinfer.graph.split import weights_of
from pyinfer.graph.tensor_split import columns_of, shard_graph
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.tensor_stage import TensorStage

pytestmark = pytest.mark.backend
TinyModel = Callable[..., Path]
SHAPE = TinyShape(n_layers=2, n_embd=128, n_ff=256, n_heads=8, n_kv_heads=4, head_dim=32)
CONFIG = StageConfig(n_pages=8, n_ctx=128, max_tokens=64, kv_dtype="f32")
PROMPT: list[int] = np.random.RandomState(5).randint(0, 300, 40).tolist()
PAGES = [3, 0, 6]


def built(path: Path) -> Graph:
    return build_graph(GGUFFile.open(path))


def ranks_of(graph: Graph, n: int) -> tuple[TensorStage, RankSum]:
    total = RankSum(n)
    shards = [optimize(shard) for shard in shard_graph(graph, n)]
    return TensorStage([ReferenceStage(shard, CONFIG, all_reduce=total.of(i)) for i, shard in enumerate(shards)]), total


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("n", [2, 4])
def test_ranks_compute_what_one_device_does(arch: str, n: int, tiny_model: TinyModel) -> None:
    """Float weights: only the order of sums differs."""
    graph = built(tiny_model(arch, "F32", shape=SHAPE))
    pages = [PAGES, [1, 2, 4]][: len(graph.kv_groups)]
    expected = run_prompt(ReferenceStage(optimize(graph), CONFIG), PROMPT, pages, 16, 9)
    stage, total = ranks_of(graph, n)
    logits = run_prompt(stage, PROMPT, pages, 16, 9)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    n_sums = 3 if arch == "qwen2moe" else 2  # halves of a block, and its shared expert
    assert total.n_calls == 5 * (n_sums * len(graph.kv_layers) + 1)  # steps; blocks and logits
    stage.close()


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
@pytest.mark.parametrize("codec", ["Q8_0", "Q4_0", "F16"])
def test_quantized_columns_are_cut_at_blocks(arch: str, codec: str, tiny_model: TinyModel) -> None:
    """int8 activations are rounded in the same blocks, so that a code differs only where a sum's last bit decides."""
    graph = built(tiny_model(arch, codec, shape=SHAPE))
    expected = run_prompt(ReferenceStage(optimize(graph), CONFIG), PROMPT, PAGES, 16)
    stage, _ = ranks_of(graph, 2)
    logits = run_prompt(stage, PROMPT, PAGES, 16)
    assert np.abs(logits - expected).max() < 4e-2 * np.abs(expected).max()
    rows = slice(None) if arch == "llama" else slice(0, 1)  # of experts, in most rows some code differs
    assert np.median(np.abs(logits - expected)[rows]) < 1e-4 * np.abs(expected).max()
    stage.close()


def test_each_rank_holds_its_part(tiny_model: TinyModel) -> None:
    graph = built(tiny_model("llama", "Q8_0", shape=SHAPE))
    shards = shard_graph(graph, 4)
    whole = sum(weight.data.nbytes for weight in weights_of(graph))
    table = next(weight for weight in weights_of(graph) if weight.name == "token_embd.weight").data.nbytes
    for shard in shards:
        assert sum(weight.data.nbytes for weight in weights_of(shard)) - table == (whole - table) // 4
        assert kv_page_bytes(shard, 16, "f16") == kv_page_bytes(graph, 16, "f16") // 4
        assert sum(isinstance(op, AllReduce) for op in shard.ops) == 2 * len(graph.kv_layers)
        assert shard.is_head and shard.ops[-1].inputs[0].width == graph.n_vocab // 4


def test_each_rank_holds_a_part_of_every_expert(tiny_model: TinyModel) -> None:
    graph = built(tiny_model("qwen3moe", "Q8_0", shape=SHAPE))
    tensors = {weight.name: weight for weight in weights_of(graph)}
    for rank, shard in enumerate(shard_graph(graph, 2)):
        own = {weight.name: weight.dequantize() for weight in weights_of(shard)}
        half = slice(128 * rank, 128 * (rank + 1))
        for name, rows in (("blk.1.ffn_up_exps.weight", True), ("blk.1.ffn_down_exps.weight", False)):
            whole = tensors[name].dequantize()
            np.testing.assert_array_equal(own[name], whole[:, half] if rows else whole[:, :, half])
        np.testing.assert_array_equal(
            own["blk.0.ffn_gate_inp.weight"], tensors["blk.0.ffn_gate_inp.weight"].dequantize()
        )


def test_pages_move_on_all_ranks(tiny_model: TinyModel) -> None:
    stage, _ = ranks_of(built(tiny_model("llama", "F32", shape=SHAPE)), 2)
    run_prompt(stage, PROMPT[:-1], PAGES, 16)
    expected = stage.run(make_batch([Piece(PROMPT[-1:], PAGES, 39)], 16)).copy()
    stage.copy_page(6, 7)
    away = stage.read_pages([3, 0])
    stage.write_pages([3, 0, 6], np.zeros((3, away.shape[1]), np.uint8))
    stage.write_pages([1, 2], away)
    np.testing.assert_array_equal(stage.run(make_batch([Piece(PROMPT[-1:], [1, 2, 7], 39)], 16)), expected)
    stage.close()


@pytest.mark.parametrize("codec", ["Q4_K", "Q8_0"])
def test_columns_of_a_matrix(codec: str, tiny_model: TinyModel) -> None:
    tensor = next(iter(weights_of(built(tiny_model("llama", codec, shape=TinyShape(n_embd=512))))))
    part = columns_of(tensor, 256, 512)
    assert part.shape == (tensor.shape[0], 256)
    np.testing.assert_array_equal(part.dequantize(), tensor.dequantize()[:, 256:])


@pytest.mark.parametrize(
    "arch, shape, n, words",
    [
        ("llama", SHAPE, 3, "cannot be shared out over 3 GPUs"),
        ("llama", TinyShape(n_embd=256, n_ff=256, n_heads=8, n_kv_heads=1, head_dim=32), 2, "key heads|attn_k"),
    ],
)
def test_what_cannot_be_shared_out_is_named(
    arch: str, shape: TinyShape, n: int, words: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(ConfigError, match=words):
        shard_graph(built(tiny_model(arch, "F32", shape=shape)), n)
    with pytest.raises(ConfigError, match=r"256 columns of blk.0.ffn_down_exps.weight in blocks of 256 cannot be"):
        shard_graph(built(tiny_model("qwen3moe", "Q4_K", shape=TinyShape(n_embd=512, n_ff=256, n_kv_heads=4))), 2)
    with pytest.raises(ConfigError, match="blocks of 256"):
        shard_graph(built(tiny_model("llama", "Q4_K", shape=TinyShape(n_embd=256, n_ff=256, n_kv_heads=4))), 2)
