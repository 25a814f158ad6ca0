"""`llama`: Llama 1 to 3, Mistral, SmolLM (arXiv:2302.13971, arXiv:2407.21783); with experts Mixtral (arXiv:2401.04088)."""

from __future__ import annotations

import math
from typing import Literal

from pyinfer.graph.graph import Graph
from pyinfer.runtime.models.builder import DecoderBuilder
from pyinfer.runtime.models.common import ExpertSizes, ModelReader, read_experts, read_rope, read_sizes


def build(reader: ModelReader) -> Graph:
    """GGUF stores llama's q and k permuted for interleaved rotary pairs."""
    experts = None
    if reader.value("expert_count"):
        experts = read_experts(reader, reader.integer("feed_forward_length"), normalize=True)
    return decoder(reader, "interleaved", experts)


def decoder(reader: ModelReader, pairing: Literal["interleaved", "half"], experts: ExpertSizes | None = None) -> Graph:
    """Pre-norm decoder with grouped heads."""
    sizes = read_sizes(reader)
    rope = read_rope(reader, sizes, pairing)
    b = DecoderBuilder(reader, sizes)
    x = b.embed()
    for i in range(sizes.n_layers):
        blk = f"blk.{i}"
        h = b.norm(f"{blk}.attn_norm", x)
        q = b.rope(b.matmul(f"{blk}.attn_q", h, sizes.q_width), rope)
        k = b.rope(b.matmul(f"{blk}.attn_k", h, sizes.kv_width), rope)
        v = b.matmul(f"{blk}.attn_v", h, sizes.kv_width)
        h = b.attention(q, k, v, 1 / math.sqrt(sizes.head_dim))
        if i == sizes.n_layers - 1:
            h, x = b.select_outputs(h, x)
        x = b.add(b.matmul(f"{blk}.attn_output", h, sizes.n_embd), x)
        x = b.add(b.feed_forward(blk, b.norm(f"{blk}.ffn_norm", x), "silu", experts=experts), x)
    return b.finish(x)
