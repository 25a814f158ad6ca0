"""`qwen2`: Qwen 2 and 2.5 (arXiv:2407.10671): llama with biases on q, k and v, and NeoX rotary pairs."""

from __future__ import annotations

from pyinfer.graph.graph import Graph
from pyinfer.runtime.models import llama
from pyinfer.runtime.models.common import ModelReader


def build(reader: ModelReader) -> Graph:
    """The biases are tensors of the file, which the builder takes wherever there are any."""
    reader.reject_experts()
    return llama.decoder(reader, "half")
