"""Graphs cut between any two ops: the parts, chained, give every bit of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch, one_table, run_prompt
from cut_places import cut_places
from tiny_models import TinyShape

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.held_results import HeldResults
from pyinfer.graph.ops import Attention, Hidden, MatMul, Quantize, StoreKV
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.split import sources, split_graph
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.stage_chain import StageChain

pytestmark = pytest.mark.unit
CONFIG = StageConfig(n_pages=8, n_ctx=128, max_tokens=64)
PROMPT: list[int] = np.random.RandomState(5).randint(0, 300, 37).tolist()
PAGES = [3, 0, 6, 5]
SHAPE = TinyShape(n_layers=3)


def graph_of(path: Path, *, optimized: bool = True) -> Graph:
    graph = build_graph(GGUFFile.open(path))
    return one_table(optimize(graph) if optimized else graph)


def chain_of(graph: Graph, cuts: Sequence[int]) -> StageChain:
    parts = split_graph(graph, cuts)
    return StageChain([ReferenceBackend().open_stage(part, CONFIG) for part in parts], sources(parts))


@pytest.mark.parametrize("arch, codec", [("llama", "Q4_0"), ("gemma3", "Q8_0"), ("qwen3", "F16"), ("qwen2", "Q4_0")])
def test_any_cut_keeps_every_bit(arch: str, codec: str, tiny_model: Callable[..., Path]) -> None:
    """One cut at each place, then all at once: every op a stage of its own."""
    graph = graph_of(tiny_model(arch, codec, shape=TinyShape(n_layers=2)))
    expected = run_prompt(ReferenceBackend().open_stage(graph, CONFIG), PROMPT, PAGES, 16, 16)
    everywhere = cut_places(graph)
    assert len(everywhere) > 15
    for cuts in (*([cut] for cut in everywhere), everywhere):
        np.testing.assert_array_equal(run_prompt(chain_of(graph, cuts), PROMPT, PAGES, 16, 16), expected)


def test_random_cuts_with_few_outputs(tiny_model: Callable[..., Path]) -> None:
    rng = np.random.RandomState(0)
    for optimized in (True, False):
        graph = graph_of(tiny_model("gemma3", "Q4_0", shape=SHAPE), optimized=optimized)
        everywhere = cut_places(graph)
        for _ in range(6):
            chain = chain_of(graph, sorted(rng.choice(everywhere, 4, replace=False).tolist()))
            whole = ReferenceBackend().open_stage(graph, CONFIG)
            first = make_batch([Piece(PROMPT[:20], PAGES), Piece(PROMPT[:9], [7, 1])], 16, [])
            assert chain.run(first).shape == whole.run(first).shape == (0, 300)
            last = make_batch([Piece(PROMPT[20:], PAGES, 20), Piece(PROMPT[9:12], [7, 1], 9)], 16, [16, 18])
            np.testing.assert_array_equal(chain.run(last), whole.run(last))


def test_what_crosses_is_not_rounded(tiny_model: Callable[..., Path]) -> None:
    """Of a norm before q, k and v, the exact rows go to the part that multiplies, which rounds them by itself."""
    graph = graph_of(tiny_model("llama", "Q4_0"))
    first = next(i for i, op in enumerate(graph.ops) if isinstance(op, MatMul))
    assert graph.ops[first].inputs[0].dtype == "a8"
    before, after = split_graph(graph, [first])
    assert {value.dtype for value in before.results} == {"f32"} and len(before.results) == 2  # the residual too
    hidden = [op.out for op in after.ops if isinstance(op, Hidden)]
    assert set(map(id, hidden)) == set(map(id, before.results))
    assert sum(isinstance(op, Quantize) for op in after.ops) > 0
    assert sources([before, after]) == [[], [(0, before.results.index(value)) for value in hidden]]


def test_keys_stay_with_their_attention(tiny_model: Callable[..., Path]) -> None:
    graph = graph_of(tiny_model("llama", "Q4_0"))
    store = next(i for i, op in enumerate(graph.ops) if isinstance(op, StoreKV))
    with pytest.raises(AssertionError, match="keys and values"):
        split_graph(graph, [store + 1])


def test_parts_of_one_owner_have_the_same_layers(tiny_model: Callable[..., Path]) -> None:
    graph = graph_of(tiny_model("llama", "Q4_0", shape=SHAPE))
    cut = [i for i, op in enumerate(graph.ops) if isinstance(op, Attention)][1] + 1
    assert [op.layer for op in split_graph(graph, [cut])[1].ops if isinstance(op, Attention)] == [0]
    for first, second in (split_graph(graph, [cut], ["a", "a"]), split_graph(graph, [2, cut], ["a", "b", "b"])[1:]):
        assert [op.layer for op in second.ops if isinstance(op, Attention)] == [2]
        assert first.kv_layers == second.kv_layers == graph.kv_layers and first.kv_groups == second.kv_groups


def test_results_are_held_as_long_as_they_are_read() -> None:
    held = HeldResults[str]()
    held.hold(1, ["a", "b"])
    held.hold(3, ["c"])
    assert held.release_before(1) == []
    assert held.release_before(2) == ["a", "b"]
    assert held.release_before(3) == []
    assert held.release_before(4) == ["c"] and held.release_before(9) == []
