"""`qwen3` and `qwen3moe`: Qwen 3 (arXiv:2505.09388): each head of q and k is normalized before it is rotated."""

from __future__ import annotations

import math

from pyinfer.graph.graph import Graph
from pyinfer.runtime.models.builder import DecoderBuilder
from pyinfer.runtime.models.common import ExpertSizes, ModelReader, read_experts, read_rope, read_sizes


def build(reader: ModelReader) -> Graph:
    """Pre-norm decoder with grouped heads and an RMSNorm on every head of q and k."""
    reader.reject_experts()
    return _build(reader, None)


def build_moe(reader: ModelReader) -> Graph:
    """The same with experts; without a width of their own they share `feed_forward_length`."""
    n_ff = reader.integer("feed_forward_length") // reader.integer("expert_used_count")
    return _build(reader, read_experts(reader, max(1, n_ff), normalize=True))


def _build(reader: ModelReader, experts: ExpertSizes | None) -> Graph:
    sizes = read_sizes(reader)
    rope = read_rope(reader, sizes, "half")
    b = DecoderBuilder(reader, sizes)
    x = b.embed()
    for i in range(sizes.n_layers):
        blk = f"blk.{i}"
        h = b.norm(f"{blk}.attn_norm", x)
        q = b.norm(f"{blk}.attn_q_norm", b.matmul(f"{blk}.attn_q", h, sizes.q_width), sizes.head_dim)
        k = b.norm(f"{blk}.attn_k_norm", b.matmul(f"{blk}.attn_k", h, sizes.kv_width), sizes.head_dim)
        v = b.matmul(f"{blk}.attn_v", h, sizes.kv_width)
        h = b.attention(b.rope(q, rope), b.rope(k, rope), v, 1 / math.sqrt(sizes.head_dim))
        if i == sizes.n_layers - 1:
            h, x = b.select_outputs(h, x)
        x = b.add(b.matmul(f"{blk}.attn_output", h, sizes.n_embd), x)
        x = b.add(b.feed_forward(blk, b.norm(f"{blk}.ffn_norm", x), "silu", experts=experts), x)
    return b.finish(x)
