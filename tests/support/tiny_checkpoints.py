"""Tiny random checkpoints of every family, made with transformers, and their logits.

Needs torch and transformers, so only tests marked `large` use it. Sizes are such that heads, groups, windows and
rotary scalings all differ from each other.
"""

from __future__ import annotations

import json
import lzma
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hf_tokenizers import byte_level_tokenizer, wordpiece_tokenizer
from sentencepiece_file import write_sentencepiece

from pyinfer.quant.gguf import GGUFFile

VOCABULARIES = Path(__file__).parents[1] / "data" / "vocab"
N_TOKENS = 40

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
_PHI3_LONG = {
    "vocab_size": 32064,
    "rope_parameters": _LONG,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 256,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_PHI3_ADDED = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|end|>", "<|user|>")


@dataclass(frozen=True)
class TinyCheckpoint:
    """The class of transformers, what its config says, and which tokenizer lies beside it."""

    model: str
    tokenizer: str  # 'spm', 'phi3' (the same with added tokens), 'gpt-2', 'qwen2' or 'bert-bge'
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    runs_here: bool = True  # whether pyinfer knows the architecture, beside llama.cpp
    n_tokens: int = N_TOKENS
    n_ctx: int = 256  # longrope has other factors beyond its original context


CASES: dict[str, TinyCheckpoint] = {
    "llama": TinyCheckpoint("LlamaForCausalLM", "spm", {"head_dim": 48}),
    "llama tied, biases, bfloat16": TinyCheckpoint(
        "LlamaForCausalLM",
        "spm",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        dtype="bfloat16",
    ),
    "llama3": TinyCheckpoint("LlamaForCausalLM", "gpt-2", {"head_dim": 32, "rope_parameters": _LLAMA3}),
    "mistral": TinyCheckpoint("MistralForCausalLM", "spm", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": TinyCheckpoint("Qwen2ForCausalLM", "qwen2", {}),
    "qwen2 yarn": TinyCheckpoint("Qwen2ForCausalLM", "qwen2", {"rope_parameters": _YARN}),
    "qwen3": TinyCheckpoint("Qwen3ForCausalLM", "qwen2", {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": TinyCheckpoint("MixtralForCausalLM", "spm", {"num_local_experts": 4, "num_experts_per_tok": 3}),
    "mixtral 8, bfloat16": TinyCheckpoint("MixtralForCausalLM", "spm", {"head_dim": 32}, dtype="bfloat16"),
    "qwen2moe": TinyCheckpoint(
        "Qwen2MoeForCausalLM", "qwen2", {**_EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 128}
    ),
    "qwen3moe": TinyCheckpoint(
        "Qwen3MoeForCausalLM",
        "qwen2",
        {**_EXPERTS, "head_dim": 32, "num_local_experts": 6, "norm_topk_prob": True},
    ),
    "gemma3": TinyCheckpoint(
        "Gemma3ForCausalLM",
        "spm",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": TinyCheckpoint("Phi3ForCausalLM", "phi3", {"vocab_size": 32064}),
    "phi3 window": TinyCheckpoint("Phi3ForCausalLM", "phi3", {"vocab_size": 32064, "sliding_window": 16}),
    "phi3 longrope": TinyCheckpoint("Phi3ForCausalLM", "phi3", _PHI3_LONG),
    "phi3 longrope, long": TinyCheckpoint("Phi3ForCausalLM", "phi3", _PHI3_LONG, n_tokens=300, n_ctx=512),
    "phi3 partly rotated": TinyCheckpoint(
        "Phi3ForCausalLM",
        "phi3",
        {"vocab_size": 32064, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "bert": TinyCheckpoint("BertModel", "bert-bge", {}, runs_here=False),
}


def vocabulary_file(name: str) -> GGUFFile:
    """A vocabulary file of llama.cpp's tests; it stays readable after its temporary copy is gone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.gguf"
        path.write_bytes(lzma.decompress((VOCABULARIES / f"{name}.gguf.xz").read_bytes()))
        return GGUFFile.open(path)


def write_checkpoint(
    folder: Path, case: str, qwen2: Callable[[], GGUFFile]
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Save the checkpoint of `CASES[case]`; returns ids and their logits (hidden states for BERT) in float32.

    `qwen2` opens a file with Qwen's vocabulary, which is too large for this repository.
    """
    import torch
    import transformers

    tiny = CASES[case]
    n_vocab = _write_tokenizer(folder, tiny, qwen2)
    model_class = getattr(transformers, tiny.model)
    sizes = {key: size for key, size in _SIZES.items() if tiny.model != "BertModel" or "key_value" not in key}
    config = model_class.config_class(**{**sizes, "vocab_size": n_vocab, **tiny.options})
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 3 / parameter.shape[-1] ** 0.5
            noise = torch.randn_like(parameter) * scale
            is_norm = parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(noise + 1 if is_norm and "gemma" not in case else noise)
    model.to(getattr(torch, tiny.dtype)).save_pretrained(folder)
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = np.random.default_rng(0).integers(300, 20000, tiny.n_tokens).tolist()
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    rows = output.last_hidden_state if tiny.model == "BertModel" else output.logits
    return ids, rows[0].float().numpy()


def _write_tokenizer(folder: Path, tiny: TinyCheckpoint, qwen2: Callable[[], GGUFFile]) -> int:
    """The tokenizer's files; returns how many tokens it has."""
    folder.mkdir(parents=True, exist_ok=True)
    if tiny.tokenizer in ("spm", "phi3"):
        file = vocabulary_file("llama-spm")
        keys = ("tokens", "scores", "token_type")
        columns = [file.require(f"tokenizer.ggml.{key}", list) for key in keys]
        write_sentencepiece(folder / "tokenizer.model", zip(*columns, strict=True))
        config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True}
        if tiny.tokenizer == "phi3":
            config["added_tokens_decoder"] = {
                str(32000 + i): {"content": text, "special": True} for i, text in enumerate(_PHI3_ADDED)
            }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return len(columns[0])
    make: Callable[[GGUFFile], Any] = wordpiece_tokenizer if tiny.tokenizer == "bert-bge" else byte_level_tokenizer
    tokenizer = make(qwen2() if tiny.tokenizer == "qwen2" else vocabulary_file(tiny.tokenizer))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if tiny.tokenizer == "bert-bge":
        names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "sep", "pad", "cls", "mask")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(tokenizer.get_vocab_size())
