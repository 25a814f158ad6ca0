"""Graphs cut at block boundaries: a chain of stages computes what one stage does, bit by bit, pages included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch, one_table, run_prompt
from tiny_models import TinyShape

from pyinfer.graph.backend import Stage, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, Embed, Hidden
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.split import block_cuts, split_graph, weights_of
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.stage_chain import StageChain

pytestmark = pytest.mark.backend

TinyModel = Callable[..., Path]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
SHAPE = TinyShape(n_layers=3)
PROMPT: list[int] = np.random.RandomState(5).randint(0, 300, 50).tolist()
PAGES = [3, 0, 6, 5]
CONFIG = StageConfig(n_pages=8, n_ctx=128, max_tokens=64, n_threads=2)


def graph_of(path: Path) -> Graph:
    return one_table(optimize(build_graph(GGUFFile.open(path))))


def parts_of(graph: Graph, *blocks: int) -> list[Graph]:
    """Cut before these blocks; n_blocks is the head."""
    cuts = block_cuts(graph)
    return split_graph(graph, [cuts[block] for block in blocks])


@contextmanager
def chain(parts: list[Graph], config: StageConfig = CONFIG) -> Iterator[StageChain]:
    stages = StageChain([CPUBackend().open_stage(part, config) for part in parts])
    try:
        yield stages
    finally:
        stages.close()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("codec", ["Q4_0", "F16"])
def test_any_cut_keeps_every_bit(arch: str, codec: str, tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model(arch, codec, shape=SHAPE))
    with chain([graph]) as whole:
        expected = run_prompt(whole, PROMPT, PAGES, 16)
    for blocks in ((1,), (2,), (3,), (0, 3), (1, 3), (0, 1, 2, 3)):
        with chain(parts_of(graph, *blocks)) as stages:
            for size in (None, 7):
                np.testing.assert_array_equal(run_prompt(stages, PROMPT, PAGES, 16, size), expected)


def test_parts_hold_each_block_once(tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model("gemma3", "Q4_K", shape=SHAPE))
    first, second, head = parts_of(graph, 1, 3)
    assert [part.kv_layers for part in (first, second, head)] == [graph.kv_layers[:1], graph.kv_layers[1:], ()]
    assert [op.layer for op in second.ops if isinstance(op, Attention)] == [0, 1]
    assert isinstance(first.ops[0], Embed) and isinstance(second.ops[0], Hidden) and isinstance(head.ops[0], Hidden)
    assert (first.logits.rows, second.logits.rows, head.logits.rows) == ("tokens", "outputs", "outputs")
    shared = {id(w.data) for w in weights_of(first)} & {id(w.data) for w in weights_of(head)}
    assert len(shared) == 1  # gemma's output matrix is its embedding
    all_weights = {id(w.data) for w in weights_of(graph)}
    assert {id(w.data) for part in (first, second, head) for w in weights_of(part)} == all_weights


def test_a_step_without_outputs_passes_the_head(tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model("llama", "Q8_0", shape=SHAPE))
    with chain([graph]) as whole, chain(parts_of(graph, 2, 3)) as stages:
        for stage in (whole, stages):
            assert stage.run(make_batch([Piece(PROMPT[:20], PAGES)], 16, [])).shape == (0, 300)
        last = make_batch([Piece(PROMPT[20:], PAGES, 20)], 16, [29])
        np.testing.assert_array_equal(stages.run(last), whole.run(last))


@pytest.mark.parametrize("kv_dtype", ["f16", "q8_0,f32"])
def test_pages_are_copied_and_swapped_through_all_stages(kv_dtype: str, tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model("qwen3", "Q4_0", shape=TinyShape(n_layers=3, head_dim=32)))
    config = StageConfig(n_pages=8, n_ctx=128, max_tokens=64, kv_dtype=kv_dtype)
    with chain(parts_of(graph, 1, 3), config) as stages:
        check_moves(stages)


def test_reference_stages_chain_too(tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model("llama", "Q8_0", shape=SHAPE))
    backend = ReferenceBackend()
    stages = StageChain([backend.open_stage(part, CONFIG) for part in parts_of(graph, 2)])
    whole = backend.open_stage(graph, CONFIG)
    expected = run_prompt(whole, PROMPT, PAGES, 16)
    np.testing.assert_array_equal(run_prompt(stages, PROMPT, PAGES, 16), expected)
    check_moves(stages)


def check_moves(stages: Stage) -> None:
    """The next token's logits are the same from pages that were copied, and from pages that were away."""
    run_prompt(stages, PROMPT[:-1], PAGES, 16)

    def last(pages: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return stages.run(make_batch([Piece(PROMPT[-1:], pages, 49)], 16)).copy()

    expected = last(PAGES)
    stages.copy_page(5, 7)
    away = stages.read_pages([3, 0, 6])
    assert away.dtype == np.uint8 and len(away) == 3
    stages.write_pages([3, 0, 6], np.zeros_like(away))
    assert not np.array_equal(last([3, 0, 6, 7]), expected)
    stages.write_pages([1, 2, 4], away)
    np.testing.assert_array_equal(last([1, 2, 4, 7]), expected)
