"""Made-up checkpoints of decoders: two layers of random weights, 300 tokens, SentencePiece's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors_file import write_safetensors
from sentencepiece_file import write_sentencepiece

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, LAYERS = 64, 96, 4, 2, 300, 2
Tensors = dict[str, npt.NDArray[np.float32]]


def decoder_tensors(biases: bool = False, head: bool = True, norms: tuple[str, ...] = ()) -> Tensors:
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.1, (rows, columns)).astype(np.float32)

    def vector(size: int) -> npt.NDArray[np.float32]:
        return rng.normal(1, 0.1, size).astype(np.float32)

    kv = HIDDEN * KV_HEADS // HEADS
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": vector(HIDDEN)}
    if head:
        tensors["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm", *norms):
            tensors[f"{p}{name}.weight"] = vector(HIDDEN // HEADS if "self_attn" in name else HIDDEN)
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
            if biases:
                tensors[f"{p}self_attn.{name}_proj.bias"] = vector(rows)
        tensors[f"{p}mlp.gate_proj.weight"] = matrix(FFN, HIDDEN)
        tensors[f"{p}mlp.up_proj.weight"] = matrix(FFN, HIDDEN)
        tensors[f"{p}mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
    return tensors


def write_checkpoint(
    folder: Path,
    tensors: Tensors | None = None,
    dtype: str = "F32",
    architecture: str = "LlamaForCausalLM",
    **config: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": [architecture],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    (folder / "config.json").write_text(json.dumps({key: v for key, v in values.items() if v is not None}))
    write_safetensors(folder / "model.safetensors", decoder_tensors() if tensors is None else tensors, dtype)
    kinds = [2, 3, 3] + [6] * 256
    texts = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [(chr(0x2581 if i == 0 else 96 + i), -float(i), 1) for i in range(27)]
    write_sentencepiece(
        folder / "tokenizer.model", [*((t, 0.0, k) for t, k in zip(texts, kinds, strict=True)), *letters]
    )
    return folder
