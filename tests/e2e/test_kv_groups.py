"""Gemma 3 beyond its window of 512: the same tokens from pages by groups as from pages of all layers, in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pyinfer.graph.backend import StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.graph.kv_groups import one_group
from pyinfer.graph.passes import optimize
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.e2e

TEXT = (Path(__file__).parent.parent / "data" / "king_james.txt").read_text(encoding="utf-8")
PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def run(graph: Graph, tokenizer: Tokenizer, prompts: list[list[int]], n_pages: int) -> tuple[list[list[int]], int]:
    """The answers, and the bytes that the first request held at its end, alone."""
    config = StageConfig(n_pages=n_pages, n_ctx=1300, max_tokens=256, n_threads=2)
    engine = Engine(
        CPUBackend().open_stage(graph, config), config, tokenizer, n_vocab=graph.n_vocab, kv_groups=graph.kv_groups
    )
    answers: list[list[int]] = [[] for _ in prompts]
    n_held = 0
    for begin, end in ((0, 1), (1, len(prompts))):
        for i in range(begin, end):
            engine.add_request(str(i), prompts[i], PARAMS)
        while engine.has_work:
            if end == 1:
                n_held = engine.scheduler.pool.n_held
            for output in engine.step():
                answers[int(output.request_id)] += output.new_token_ids
            engine.check()
    engine.close()
    return answers, n_held * kv_page_bytes(graph, config.block_size, config.kv_dtype)


def test_gemma_beyond_its_window(model_path: Callable[[str], Path]) -> None:
    with GGUFFile.open(model_path("gemma3-270m")) as file:
        graph, tokenizer = optimize(build_graph(file)), load_tokenizer(file)
        merged = replace(graph, kv_groups=one_group(graph.kv_layers))
        assert [group.window for group in graph.kv_groups] == [None, *[512] * 5]
        text = tokenizer.encode(TEXT[:8000])
        prompts = [text[:1200], text[:700], [*text[:900], 5]]  # the others begin as the first, which is in the cache
        expected, before = run(merged, tokenizer, prompts, 300)
        answers, after = run(graph, tokenizer, prompts, 6 * 300)
        assert answers == expected
        # 1,215 tokens in 76 blocks of 16: 18 layers of them, against 3 and 15 layers of the 33 that a window is in
        layer = 16 * 2 * 256 * 2
        assert before == 18 * 76 * layer and after == (3 * 76 + 15 * 33) * layer
        scarce, _ = run(graph, tokenizer, prompts, 340)  # little more than one takes: what windows passed is forgotten
        assert scarce == expected
