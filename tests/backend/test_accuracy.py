"""A real model on every ISA: as close to an exact run as llama.cpp is, and decode equal to the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch, run_prompt
from cpu_kernels import ISAS
from golden import golden_prompts

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.passes import optimize
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_cpu.stage import CPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = pytest.mark.e2e

MODEL = "smollm2"
SHORT = ("chat", "facts", "story")  # all prompts are for the best ISA, in tests/e2e
PAGES: list[int] = np.random.RandomState(0).permutation(64).tolist()


@pytest.fixture(params=ISAS)
def stage(
    request: pytest.FixtureRequest, model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CPUStage]:
    monkeypatch.setenv("PYINFER_ISA", request.param)
    graph = optimize(build_graph(GGUFFile.open(model_path(MODEL))))
    stage = CPUBackend().open_stage(graph, StageConfig(n_pages=64, n_ctx=1024, n_threads=2))
    yield stage
    stage.close()


def test_no_further_from_exact_than_llamacpp(stage: CPUStage) -> None:
    prompts = [prompt for name, prompt in golden_prompts(MODEL).items() if name in SHORT]
    ours, theirs = [], []
    for prompt in prompts:
        logits = run_prompt(stage, prompt.ids, PAGES, 16)
        ours.append(float(prompt.kl(logits).sum()))
        theirs.append(prompt.llamacpp_kl * len(prompt.ids))
        # decode by itself, at a few places of the prompt that is in the pages now
        for position in (0, 1, len(prompt.ids) - 1):
            alone = stage.run(make_batch([Piece([prompt.ids[position]], PAGES, position)], 16))
            np.testing.assert_array_equal(alone[0], logits[position])
    assert sum(ours) <= 1.1 * sum(theirs), (ours, theirs)
