"""`gemma3`: Gemma 3, text (arXiv:2503.19786): norms around each part, most layers see a window only."""

from __future__ import annotations

import math

import numpy as np

from pyinfer.graph.graph import Graph
from pyinfer.graph.rope import Rope
from pyinfer.runtime.models.builder import DecoderBuilder
from pyinfer.runtime.models.common import ModelReader, Sizes, read_rope, read_sizes

_N_LAYERS_27B = 62  # the one size whose attention is scaled by n_embd / n_heads instead of its head size


def build(reader: ModelReader) -> Graph:
    """Decoder with scaled embedding, q/k norms, and rotary bases of its own for local and global layers."""
    reader.reject_experts()
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if reader.number(key, 0.0):
            raise reader.key_error(key, "is set; soft-capping is not supported")
    sizes = read_sizes(reader)
    global_rope = read_rope(reader, sizes, "half")
    local_rope = Rope(global_rope.n_dims, "half", reader.number("rope.freq_base_swa", 10000.0))
    is_local = _local_layers(reader, sizes)
    window = reader.integer("attention.sliding_window") if any(is_local) else None
    per_head = sizes.n_embd // sizes.n_heads if sizes.n_layers == _N_LAYERS_27B else sizes.head_dim
    b = DecoderBuilder(reader, sizes)
    x = b.embed(scale=float(np.sqrt(np.float32(sizes.n_embd))))
    for i in range(sizes.n_layers):
        blk = f"blk.{i}"
        rope = local_rope if is_local[i] else global_rope
        h = b.norm(f"{blk}.attn_norm", x)
        q = b.norm(f"{blk}.attn_q_norm", b.matmul(f"{blk}.attn_q", h, sizes.q_width), sizes.head_dim)
        k = b.norm(f"{blk}.attn_k_norm", b.matmul(f"{blk}.attn_k", h, sizes.kv_width), sizes.head_dim)
        v = b.matmul(f"{blk}.attn_v", h, sizes.kv_width)
        h = b.attention(b.rope(q, rope), b.rope(k, rope), v, 1 / math.sqrt(per_head), window if is_local[i] else None)
        if i == sizes.n_layers - 1:
            h, x = b.select_outputs(h, x)
        h = b.matmul(f"{blk}.attn_output", h, sizes.n_embd)
        x = b.add(b.norm(f"{blk}.post_attention_norm", h), x)
        h = b.feed_forward(blk, b.norm(f"{blk}.ffn_norm", x), "gelu_tanh")
        x = b.add(b.norm(f"{blk}.post_ffw_norm", h), x)
    return b.finish(x)


def _local_layers(reader: ModelReader, sizes: Sizes) -> list[bool]:
    """Which layers see the window only: none without one, else the metadata's pattern, else all but every sixth."""
    if not reader.value("attention.sliding_window"):
        return [False] * sizes.n_layers
    pattern = reader.value("attention.sliding_window_pattern")
    if isinstance(pattern, (list, np.ndarray)):
        if len(pattern) != sizes.n_layers:
            raise reader.key_error(
                "attention.sliding_window_pattern",
                f"has {len(pattern)} entries; expected one for each of {sizes.n_layers} layers",
            )
        return [bool(entry) for entry in pattern]
    if pattern == 0:
        return [True] * sizes.n_layers
    period = reader.integer("attention.sliding_window_pattern", 6)
    return [i % period < period - 1 for i in range(sizes.n_layers)]
