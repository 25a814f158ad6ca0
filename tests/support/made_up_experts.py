"""Made-up checkpoints of mixtures of experts, one tensor an expert, as Mixtral and Qwen 3 publish them.

Their weights come from a frozen stream, so that what llama.cpp's converter made of them can be stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from made_up_checkpoint import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, Tensors, write_checkpoint

N_EXPERTS = 5
# architecture -> name of a layer's router, and of an expert's gate, up and down
_NAMES = {
    "MixtralForCausalLM": ("block_sparse_moe.gate", "block_sparse_moe.experts.{e}.", ("w1", "w3", "w2")),
    "Qwen3MoeForCausalLM": ("mlp.gate", "mlp.experts.{e}.", ("gate_proj", "up_proj", "down_proj")),
}


def expert_tensors(architecture: str, n_vocab: int = VOCAB) -> Tensors:
    rng = np.random.RandomState(0)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.1, (rows, columns)).astype(np.float32)

    def vector(size: int) -> npt.NDArray[np.float32]:
        return rng.normal(1, 0.1, size).astype(np.float32)

    router, experts, parts = _NAMES[architecture]
    kv, head = HIDDEN * KV_HEADS // HEADS, HIDDEN // HEADS
    tensors = {"model.embed_tokens.weight": matrix(n_vocab, HIDDEN), "model.norm.weight": vector(HIDDEN)}
    tensors["lm_head.weight"] = matrix(n_vocab, HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{name}.weight"] = vector(HIDDEN)
        if "Qwen" in architecture:
            tensors[f"{p}self_attn.q_norm.weight"] = vector(head)
            tensors[f"{p}self_attn.k_norm.weight"] = vector(head)
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
        tensors[f"{p}{router}.weight"] = matrix(N_EXPERTS, HIDDEN)
        for e in range(N_EXPERTS):
            for name, shape in zip(parts, ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)), strict=True):
                tensors[f"{p}{experts.format(e=e)}{name}.weight"] = matrix(*shape)
    return tensors


def write_mixtral(folder: Path) -> Path:
    return write_checkpoint(
        folder,
        expert_tensors("MixtralForCausalLM"),
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=2,
    )


def write_qwen3_moe(folder: Path) -> Path:
    """With GPT-2's tokenizer, the smallest of those that llama.cpp's converter knows by name."""
    from hf_tokenizers import byte_level_tokenizer
    from tiny_checkpoints import vocabulary_file

    tokenizer = byte_level_tokenizer(vocabulary_file("gpt-2"))
    n_vocab = int(tokenizer.get_vocab_size())
    write_checkpoint(
        folder,
        expert_tensors("Qwen3MoeForCausalLM", n_vocab),
        "BF16",
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        head_dim=HIDDEN // HEADS,
        vocab_size=n_vocab,
        num_experts=N_EXPERTS,
        num_experts_per_tok=3,
        moe_intermediate_size=FFN,
        intermediate_size=2 * FFN,
        norm_topk_prob=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    (folder / "tokenizer.model").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder


# name of a stored answer -> the checkpoint and the type that it is converted to
STORED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "mixtral f32": (write_mixtral, "f32"),
    "mixtral q8_0": (write_mixtral, "q8_0"),
    "qwen3moe bf16": (write_qwen3_moe, "bf16"),
}
