"""What a GGUF says about itself, gathered for people: `pyinfer show`, the bench's table, a server's model card.

Reads metadata and tensor headers only; a key that is missing or of a wrong kind is None here, never an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyinfer.quant.gguf import GGUFFile

# ggml's `general.file_type` (llama_ftype): what the quantizer was asked for.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class TypeShare:
    """How much of a model one tensor type holds."""

    type: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """The facts of one file; None where it does not say."""

    path: Path
    gguf_version: int
    size: int  # bytes of the file, all shards
    tensor_bytes: int  # bytes of the weights alone
    n_params: int
    n_params_active: int  # that one token goes through: less than all where it chooses experts
    architecture: str | None
    name: str | None
    size_label: str | None
    file_type: str | None
    types: tuple[TypeShare, ...]  # by bytes, largest first
    n_ctx_train: int | None
    n_layers: int | None
    n_embd: int | None
    n_ff: int | str | None  # 'a..b' where layers differ
    n_experts: int | None
    n_experts_used: int | str | None  # by each token
    expert_n_ff: int | None
    n_heads: int | str | None
    n_kv_heads: int | str | None
    head_dim: int | None
    sliding_window: int | None
    rope_freq_base: float | None
    n_vocab: int | None
    tokenizer_model: str | None
    tokenizer_pre: str | None
    chat_templates: tuple[str, ...]  # 'default' and the names of others; empty: none
    licence: str | None
    licence_link: str | None

    @property
    def model_type(self) -> str:
        """'llama 135M Q4_1', as llama-bench names a model."""
        label = self.size_label or _parameter_label(self.n_params)
        kind = self.file_type or (self.types[0].type if self.types else "?")
        return f"{self.architecture or '?'} {label} {kind}"


def model_info(file: GGUFFile) -> ModelInfo:
    """Gathers the facts of an open file."""
    arch = _text(file, "general.architecture")
    n_heads, n_embd = _per_layer(file, f"{arch}.attention.head_count"), _count(file, f"{arch}.embedding_length")
    head_dim = _count(file, f"{arch}.attention.key_length")
    if head_dim is None and isinstance(n_heads, int) and n_heads and n_embd:
        head_dim = n_embd // n_heads
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    n_params = sum(t.n_elements for t in file.tensors.values())
    n_experts, n_used = _count(file, f"{arch}.expert_count"), _per_layer(file, f"{arch}.expert_used_count")
    freq_base = file.metadata.get(f"{arch}.rope.freq_base")
    return ModelInfo(
        path=file.path,
        gguf_version=file.version,
        size=file.size,
        tensor_bytes=sum(t.n_bytes for t in file.tensors.values()),
        n_params=n_params,
        n_params_active=n_params - _idle_params(file, n_experts, n_used),
        architecture=arch,
        name=_text(file, "general.name"),
        size_label=_text(file, "general.size_label"),
        file_type=_FILE_TYPES.get(_count(file, "general.file_type") or 0)
        if "general.file_type" in file.metadata
        else None,
        types=_type_shares(file),
        n_ctx_train=_count(file, f"{arch}.context_length"),
        n_layers=_count(file, f"{arch}.block_count"),
        n_embd=n_embd,
        n_ff=_per_layer(file, f"{arch}.feed_forward_length"),
        n_experts=n_experts,
        n_experts_used=n_used,
        expert_n_ff=_count(file, f"{arch}.expert_feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=_per_layer(file, f"{arch}.attention.head_count_kv"),
        head_dim=head_dim,
        sliding_window=_count(file, f"{arch}.attention.sliding_window"),
        rope_freq_base=float(freq_base) if isinstance(freq_base, (int, float)) else None,
        n_vocab=len(tokens) if isinstance(tokens, list) else _count(file, f"{arch}.vocab_size"),
        tokenizer_model=_text(file, "tokenizer.ggml.model"),
        tokenizer_pre=_text(file, "tokenizer.ggml.pre"),
        chat_templates=_templates(file),
        licence=_text(file, "general.license.name") or _text(file, "general.license"),
        licence_link=_text(file, "general.license.link"),
    )


def _idle_params(file: GGUFFile, n_experts: int | None, n_used: int | str | None) -> int:
    """Of the experts that a token does not choose."""
    if n_experts is None or not isinstance(n_used, int) or not 0 < n_used <= n_experts:
        return 0
    in_experts = sum(t.n_elements for name, t in file.tensors.items() if "_exps." in name)
    return in_experts - in_experts * n_used // n_experts


def _parameter_label(n_params: int) -> str:
    return f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.0f}M"


def _text(file: GGUFFile, key: str) -> str | None:
    value: Any = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _count(file: GGUFFile, key: str) -> int | None:
    value: Any = file.metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _per_layer(file: GGUFFile, key: str) -> int | str | None:
    value: Any = file.metadata.get(key)
    if hasattr(value, "tolist") and len(value):
        low, high = int(value.min()), int(value.max())
        return low if low == high else f"{low}..{high}"
    return _count(file, key)


def _templates(file: GGUFFile) -> tuple[str, ...]:
    names = ["default"] if _text(file, "tokenizer.chat_template") else []
    prefix = "tokenizer.chat_template."
    return (*names, *(key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)))


def _type_shares(file: GGUFFile) -> tuple[TypeShare, ...]:
    counts: dict[str, tuple[int, int]] = {}
    for tensor in file.tensors.values():
        n, n_bytes = counts.get(tensor.codec.name, (0, 0))
        counts[tensor.codec.name] = (n + 1, n_bytes + tensor.n_bytes)
    shares = (TypeShare(name, n, n_bytes) for name, (n, n_bytes) in counts.items())
    return tuple(sorted(shares, key=lambda share: -share.n_bytes))
