"""Sizes of the KV pool and the context; what cannot be loaded says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyinfer.errors import BackendError, ConfigError, GGUFError
from pyinfer.graph.backend import kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.backends import open_backend
from pyinfer.runtime.loader import LoadOptions, load_model, plan_sizes
from pyinfer.runtime.models.registry import build_graph

pytestmark = pytest.mark.unit
GIB = 1 << 30


@pytest.fixture(scope="module")
def graph(tiny_model: Callable[..., Path]) -> Graph:
    """2 layers of 2 key heads of 16 columns, context 512: 256 bytes a token in f16, so 4 KiB a page of 16."""
    graph = build_graph(GGUFFile.open(tiny_model()))
    assert kv_page_bytes(graph, 1, "f16") == 256 and graph.n_ctx_train == 512
    return graph


def test_pool_is_half_of_what_the_weights_leave_and_4_gib_at_most(graph: Graph) -> None:
    options = LoadOptions()
    assert plan_sizes(graph, 1 * GIB, options, available=3 * GIB).n_pages == GIB // 4096
    assert plan_sizes(graph, 0, options, available=100 * GIB).n_pages == 4 * GIB // 4096
    assert plan_sizes(graph, 0, LoadOptions(kv_cache_dtype="f32"), available=2 * GIB).n_pages == GIB // 8192
    assert plan_sizes(graph, 0, LoadOptions(kv_cache_memory=8 * GIB), available=0).n_pages == 8 * GIB // 4096


def test_context_is_the_models_or_what_the_pool_holds(graph: Graph) -> None:
    assert plan_sizes(graph, 0, LoadOptions(), available=GIB).n_ctx == 512
    assert plan_sizes(graph, 0, LoadOptions(kv_cache_memory=5 * 4096)).n_ctx == 80
    assert plan_sizes(graph, 0, LoadOptions(n_ctx=100), available=GIB).n_ctx == 100


def test_what_does_not_fit_names_both_numbers(graph: Graph) -> None:
    with pytest.raises(ConfigError, match=r"n_ctx is 200.*52.0 KiB.*80 tokens.*20.0 KiB"):
        plan_sizes(graph, 0, LoadOptions(n_ctx=200, kv_cache_memory=5 * 4096))
    with pytest.raises(ConfigError, match=r"513.*512"):
        plan_sizes(graph, 0, LoadOptions(n_ctx=513), available=GIB)
    with pytest.raises(ConfigError, match="no page of 16"):
        plan_sizes(graph, GIB, LoadOptions(), available=GIB)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ctx", -1),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("block_size", 8),
        ("n_threads", 0),
        ("kv_cache_dtype", "q4_9"),
        ("kv_cache_memory", 0),
        ("swap_room", 4),
        ("swap_space", -1),
        ("scheduling_policy", "lifo"),
        ("preemption_mode", "kill"),
        ("max_queue_wait", -1.0),
        ("num_scheduler_steps", 0),
    ],
)
def test_a_wrong_option_is_named(name: str, value: Any, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=name):
        load_model(tiny_model(), **{name: value})


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(BackendError, match=r"abacus.*cpu"):
        open_backend("abacus")


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(GGUFError):
        load_model(path)


def test_loaded_model_serves_and_closes(tiny_model: Callable[..., Path]) -> None:
    steps: list[str] = []
    with load_model(
        tiny_model(), backend="reference", kv_cache_memory=1 << 20, progress=lambda what, share: steps.append(what)
    ) as model:
        assert model.n_ctx == 512 and model.info.architecture == "llama" and model.chat_template
        assert model.kv_bytes == 1 << 20
        assert model.chat_params.temperature == 0.8
        model.engine.add_scoring("a", [1, 2, 3])
        while model.engine.has_work:
            model.engine.step()
        assert model.engine.take_logits("a").shape == (3, 300)
    assert steps
