"""Two emulated GPUs that share every block: their sums, and what they hold, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batches import run_prompt
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from rank_sum import EmulatedRank, RankSum
from tiny_models import TinyShape

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceStage
from pyinfer.graph.tensor_split import shard_graph
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.tensor_stage import open_tensor_stage

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
CONFIG = StageConfig(n_pages=6, n_ctx=64, max_tokens=4, max_sequences=2, kv_dtype="f32")
SHAPE = TinyShape(n_layers=2, n_embd=128, n_ff=256, n_heads=8, n_kv_heads=4, head_dim=32)


@pytest.mark.parametrize("codec, bound", [("F32", 1e-4), ("Q8_0", 4e-2)])
def test_two_gpus_compute_what_one_does(codec: str, bound: float, tiny_model: Callable[..., Path]) -> None:
    """Float weights differ by the order of sums; int8 activations by codes that fall the other way."""
    graph = build_graph(GGUFFile.open(tiny_model("llama", codec, shape=SHAPE)))
    prompt = list(range(30, 47))
    expected = run_prompt(ReferenceStage(optimize(graph), CONFIG), prompt, [4, 1], 16, 4)
    total = RankSum(2)
    ranks = [EmulatedRank(EmulatedDevice(all_reduce=total.of(rank))) for rank in range(2)]
    stage = open_tensor_stage(ranks, [optimize(shard) for shard in shard_graph(graph, 2)], CONFIG)
    try:
        logits = run_prompt(stage, prompt, [4, 1], 16, 4)
    finally:
        stage.close()
    assert np.abs(logits - expected).max() < bound * np.abs(expected).max()
    counts = [rank.device.launches["reduce"] for rank in ranks]
    assert counts == [5 * (2 * 2 + 1)] * 2  # steps, halves of two layers and the logits
