"""How large the KV pool and the context are."""

from __future__ import annotations

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.runtime.load_options import LoadOptions
from pyinfer.runtime.memory import memory
from pyinfer.runtime.page_layout import PageLayout
from pyinfer.runtime.sizes import format_binary
from pyinfer.runtime.threads import default_threads

MAX_KV_MEMORY = 4 << 30


def plan_sizes(graph: Graph, weight_bytes: int, options: LoadOptions, *, available: int | None = None) -> StageConfig:
    """Choose the KV pool and the context. `available` is the free memory in bytes; None measures it."""
    page_bytes = kv_page_bytes(graph, options.block_size, options.kv_cache_dtype)
    kv_memory = options.kv_cache_memory
    if kv_memory is None:
        available = memory().available if available is None else available
        kv_memory = min(MAX_KV_MEMORY, max(0, available - weight_bytes) // 2)
    n_pages = kv_memory // page_bytes
    layout = PageLayout(graph.kv_groups, options.block_size, options.step_tokens)
    held = layout.longest(n_pages)
    if held < 1:
        raise ConfigError(
            f"{format_binary(kv_memory)} of memory for keys and values holds no page of {options.block_size} tokens, "
            f"which takes {format_binary(layout.n_groups * page_bytes)}; free some memory or set kv_cache_memory",
            param="kv_cache_memory",
        )
    if options.n_ctx > graph.n_ctx_train:
        raise ConfigError(
            f"n_ctx is {options.n_ctx}, but the model was made for {graph.n_ctx_train} tokens; use at most that",
            param="n_ctx",
        )
    if options.n_ctx > held:
        needed = layout.most_pages(options.n_ctx) * page_bytes
        raise ConfigError(
            f"n_ctx is {options.n_ctx}, which takes {format_binary(needed)} of keys and values, but there is room for "
            f"{held} tokens in {format_binary(kv_memory)}; use a smaller n_ctx or set kv_cache_memory",
            param="n_ctx",
        )
    n_ctx = options.n_ctx or min(graph.n_ctx_train, held)
    return StageConfig(
        n_pages=n_pages,
        block_size=options.block_size,
        kv_dtype=options.kv_cache_dtype,
        max_tokens=options.step_tokens,
        max_sequences=options.max_num_seqs,
        n_ctx=n_ctx,
        n_threads=options.n_threads or default_threads(),
        repack_cache=options.repack_cache,
    )
