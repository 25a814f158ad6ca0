"""`qwen2moe`: Qwen 1.5 MoE and Qwen 2 57B-A14B (arXiv:2407.10671): experts, and a shared one with a gate of its own."""

from __future__ import annotations

from pyinfer.graph.graph import Graph
from pyinfer.runtime.models import llama
from pyinfer.runtime.models.common import ModelReader, read_experts


def build(reader: ModelReader) -> Graph:
    """What the chosen experts weigh are their probabilities among all; they do not add up to 1."""
    n_ff = reader.integer("feed_forward_length")
    return llama.decoder(reader, "half", read_experts(reader, n_ff, normalize=False, has_shared=True))
