"""`phi3`: Phi 3, 3.5 and 4 (arXiv:2404.14219): llama with q, k and v stored as one matrix, and gate and up too."""

from __future__ import annotations

import math

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Value
from pyinfer.runtime.models.builder import DecoderBuilder
from pyinfer.runtime.models.common import ModelReader, Sizes, read_rope, read_sizes


def build(reader: ModelReader) -> Graph:
    """Pre-norm decoder; every layer sees a window where there is one, which llama.cpp leaves out."""
    reader.reject_experts()
    sizes = read_sizes(reader)
    rope = read_rope(reader, sizes, "half")
    window = _window(reader, sizes)
    b = DecoderBuilder(reader, sizes)
    x = b.embed()
    for i in range(sizes.n_layers):
        blk = f"blk.{i}"
        q, k, v = _projections(b, blk, b.norm(f"{blk}.attn_norm", x))
        h = b.attention(b.rope(q, rope), b.rope(k, rope), v, 1 / math.sqrt(sizes.head_dim), window)
        if i == sizes.n_layers - 1:
            h, x = b.select_outputs(h, x)
        x = b.add(b.matmul(f"{blk}.attn_output", h, sizes.n_embd), x)
        x = b.add(b.feed_forward(blk, b.norm(f"{blk}.ffn_norm", x), "silu", is_fused=True), x)
    return b.finish(x)


def _projections(b: DecoderBuilder, blk: str, x: Value) -> tuple[Value, ...]:
    """q, k and v; a file may hold them apart."""
    sizes = b.sizes
    widths = {f"{blk}.attn_q": sizes.q_width, f"{blk}.attn_k": sizes.kv_width, f"{blk}.attn_v": sizes.kv_width}
    if b.reader.has(f"{blk}.attn_qkv.weight"):
        return b.split_matmul(f"{blk}.attn_qkv", x, widths)
    return tuple(b.matmul(name, x, width) for name, width in widths.items())


def _window(reader: ModelReader, sizes: Sizes) -> int | None:
    """0 means none, and one as long as the context is none."""
    if not reader.value("attention.sliding_window"):
        return None
    window = reader.integer("attention.sliding_window")
    return window if window < sizes.n_ctx_train else None
