"""Real models on the reference interpreter against an exact float32 run over the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batches import run_prompt
from golden import MODELS, golden_prompts

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = pytest.mark.e2e

PROMPTS = ("story", "facts", "code", "chat")


def pages_of(graph: Graph) -> list[list[int]]:
    """Five for each KV group, in no order."""
    n_groups = len(graph.kv_groups)
    return np.random.RandomState(0).permutation(5 * n_groups).reshape(n_groups, 5).tolist()


@pytest.mark.parametrize("model", MODELS)
def test_models_equal_the_exact_run(model: str, model_path: Callable[[str], Path]) -> None:
    graph = build_graph(GGUFFile.open(model_path(model)))
    pages = pages_of(graph)
    stage = ReferenceBackend().open_stage(graph, StageConfig(n_pages=sum(map(len, pages)), kv_dtype="f32"))
    for name in PROMPTS:
        prompt = golden_prompts(model)[name]
        logits = run_prompt(stage, prompt.ids, pages, block_size=16, chunk=50)
        assert prompt.max_error(logits) < 1e-3, name
        assert (logits.argmax(1)[prompt.rows] == prompt.top_ids[:, 0]).all(), name


@pytest.mark.parametrize("model", MODELS)
def test_int8_activations_cost_no_more_than_llamacpps(model: str, model_path: Callable[[str], Path]) -> None:
    graph = optimize(build_graph(GGUFFile.open(model_path(model))))
    pages = pages_of(graph)
    stage = ReferenceBackend().open_stage(graph, StageConfig(n_pages=sum(map(len, pages)), kv_dtype="f16"))
    ours: list[float] = []
    theirs: list[float] = []
    for name in PROMPTS:
        prompt = golden_prompts(model)[name]
        ours.extend(prompt.kl(run_prompt(stage, prompt.ids, pages, block_size=16)))
        theirs.extend([prompt.llamacpp_kl] * len(prompt.ids))
    assert np.mean(ours) < 1.1 * np.mean(theirs)
