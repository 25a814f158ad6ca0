"""GGUF files of real models' shapes with random weights: speed depends on shapes and types, not on values.

All layers hold the same bytes, so that a file of 5 GB is written as fast as the disk takes it. There is no tokenizer in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tiny_models import random_weights

from pyinfer.quant.writer import TensorStream, stream_gguf


@dataclass(frozen=True)
class Shape:
    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    n_ctx: int = 131072
    tied: bool = False


SHAPES = {
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "tiny": Shape(4, 256, 512, 8, 4, 32, 4096, n_ctx=4096),
}
MIXES = ("Q4_K_M", "Q8_0", "F16")


def codec_of(mix: str, tensor: str, layer: int, n_layers: int) -> str:
    """As llama.cpp's quantize chooses: Q4_K_M has Q6_K for the head and for half of attn_v and ffn_down."""
    if mix != "Q4_K_M":
        return mix
    more_bits = layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2
    return "Q6_K" if tensor == "output" or (tensor in ("attn_v", "ffn_down") and more_bits) else "Q4_K"


@lru_cache(maxsize=64)
def _weights(codec: str, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    return random_weights(codec, rows, columns, np.random.default_rng(rows * columns), columns**-0.5)


def write_synthetic(path: Path, name: str, mix: str) -> Path:
    """Write the model, if it is not there yet."""
    if path.exists():
        return path
    s = SHAPES[name]
    tensors: dict[str, TensorStream] = {}

    def matrix(tensor: str, rows: int, columns: int, kind: str, layer: int = 0) -> None:
        codec = codec_of(mix, kind, layer, s.n_layers)
        tensors[f"{tensor}.weight"] = TensorStream(codec, (rows, columns), _chunks(codec, rows, columns))

    def norm(tensor: str) -> None:
        ones = np.ones(s.n_embd, "<f4").view(np.uint8).reshape(1, -1)
        tensors[f"{tensor}.weight"] = TensorStream("F32", (s.n_embd,), lambda: (ones,))

    q_width, kv_width = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    matrix("token_embd", s.n_vocab, s.n_embd, "output" if s.tied else "token_embd")
    if not s.tied:
        matrix("output", s.n_vocab, s.n_embd, "output")
    norm("output_norm")
    shapes = {
        "attn_q": (q_width, s.n_embd),
        "attn_k": (kv_width, s.n_embd),
        "attn_v": (kv_width, s.n_embd),
        "attn_output": (s.n_embd, q_width),
        "ffn_gate": (s.n_ff, s.n_embd),
        "ffn_up": (s.n_ff, s.n_embd),
        "ffn_down": (s.n_embd, s.n_ff),
    }
    for layer in range(s.n_layers):
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
        for kind, (rows, columns) in shapes.items():
            matrix(f"blk.{layer}.{kind}", rows, columns, kind, layer)
    stream_gguf(path, _metadata(name, s), tensors)
    return path


def _chunks(codec: str, rows: int, columns: int) -> Callable[[], tuple[npt.NDArray[np.uint8]]]:
    return lambda: (_weights(codec, rows, columns),)


def _metadata(name: str, s: Shape) -> dict[str, object]:
    return {
        "general.architecture": "llama",
        "general.name": f"synthetic {name}",
        "llama.block_count": s.n_layers,
        "llama.context_length": s.n_ctx,
        "llama.embedding_length": s.n_embd,
        "llama.feed_forward_length": s.n_ff,
        "llama.attention.head_count": s.n_heads,
        "llama.attention.head_count_kv": s.n_kv_heads,
        "llama.attention.key_length": s.head_dim,
        "llama.attention.value_length": s.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": s.head_dim,
        "llama.rope.freq_base": 500000.0,
    }
