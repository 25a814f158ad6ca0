"""What a family of models is to the converter: a table of tensor names, a table of metadata keys, and a few hooks.

All of it is data, so that a further family is one more table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pyinfer.convert.hf_config import HFConfig
from pyinfer.errors import ConvertError
from pyinfer.quant.codec import FloatArray

RowOrder = Callable[[HFConfig, int], npt.NDArray[np.int64]]  # (config, rows) -> source row of every output row
VocabularyKind = Literal["text", "wordpiece"]
Metadata = dict[str, Any]


@dataclass(frozen=True)
class TensorRule:
    """How one tensor of a checkpoint, its weight and its bias, becomes one of a GGUF."""

    target: str  # GGUF's name without .weight or .bias; '{i}' is the layer; of all experts where the source has '{e}'
    order: RowOrder | None = None  # None: rows stay where they are
    offset: float = 0.0  # added to the weight


@dataclass(frozen=True)
class KeyRule:
    """A metadata key `<arch>.<key>` that a config value becomes."""

    source: str
    is_float: bool = False
    older: str | None = None  # what the value was called before

    def value(self, config: HFConfig) -> int | np.float32:
        source = self.older if self.older is not None and config.get(self.source) is None else self.source
        return np.float32(config.number(source)) if self.is_float else config.integer(source)


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF and the checkpoints that it is made of."""

    arch: str  # `general.architecture`
    hf_architectures: tuple[str, ...]  # of config.json's `architectures`
    tensors: Mapping[str, TensorRule]  # checkpoint's name without .weight or .bias -> rule
    keys: Mapping[str, KeyRule]  # key without the architecture -> rule
    activation: str  # the only one that the architecture stands for
    renames: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement) on the checkpoint's names, first
    ignored: tuple[str, ...] = ()  # regular expressions of names that a GGUF has no use for
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers' config class fills in
    extra_metadata: Callable[[HFConfig], Metadata] = lambda config: {}
    extra_tensors: Callable[[HFConfig], dict[str, FloatArray]] = lambda config: {}  # float32, stored as such
    check_more: Callable[[HFConfig], None] = lambda config: None  # ConvertError for what else it cannot express
    vocabulary: VocabularyKind = "text"
    adds_space: bool | None = None  # `tokenizer.ggml.add_space_prefix` of SentencePiece models; None: as configured

    def config(self, raw: Mapping[str, Any]) -> HFConfig:
        return HFConfig(raw, self.defaults)

    def metadata(self, config: HFConfig) -> Metadata:
        """All keys under the architecture's prefix."""
        values: Metadata = {key: rule.value(config) for key, rule in self.keys.items()}
        return {f"{self.arch}.{key}": value for key, value in {**values, **self.extra_metadata(config)}.items()}

    def check(self, config: HFConfig) -> None:
        """ConvertError for what the architecture cannot express."""
        activation = config.get("hidden_activation") or config.get("hidden_act") or self.activation
        if activation != self.activation:
            raise ConvertError(
                f"config.json: activation {activation!r} is not what GGUF's {self.arch!r} computes ({self.activation})"
            )
        quantized = config.get("quantization_config")
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ConvertError(
                f"config.json: the checkpoint is quantized with {method!r}; convert the one it was made from"
            )
        self.check_more(config)

    def n_experts(self, config: HFConfig) -> int:
        """How many experts a layer has; 0 in families without."""
        rule = self.keys.get("expert_count")
        return 0 if rule is None else int(rule.value(config))


def rope_metadata(config: HFConfig, *more_kinds: str) -> Metadata:
    """The keys `rope.*` of the common kinds; `more_kinds` are those that a family expresses in another way."""
    rope = config.rope()
    if rope.number("partial_rotary_factor", 1.0) != 1:
        raise ConvertError(
            f"config.json: {config.get('model_type')!r} with a partial rotary embedding is not supported"
        )
    values: Metadata = {"rope.freq_base": np.float32(rope.base)}
    if rope.local_base is not None:
        values["rope.freq_base_swa"] = np.float32(rope.local_base)
    if rope.kind in ("linear", "yarn"):
        values["rope.scaling.type"] = rope.kind
        values["rope.scaling.factor"] = np.float32(rope.number("factor"))
    elif rope.kind not in ("default", *more_kinds):
        known = ", ".join(("default", "linear", "yarn", *more_kinds))
        raise ConvertError(f"config.json: rope type {rope.kind!r} is not supported here; supported: {known}")
    if rope.kind == "yarn":
        context = rope.number("original_max_position_embeddings", config.integer("max_position_embeddings"))
        values["rope.scaling.original_context_length"] = int(context)
        optional = {
            "yarn_ext_factor": "extrapolation_factor",
            "yarn_attn_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        for key, source in optional.items():
            if rope.parameters.get(source) is not None:
                values[f"rope.scaling.{key}"] = np.float32(rope.number(source))
    return values


def llama3_factors(config: HFConfig) -> dict[str, FloatArray]:
    """The tensor of Llama 3.1's frequency factors [rotated columns / 2]: long waves are stretched, short ones kept."""
    rope = config.rope()
    if rope.kind != "llama3":
        return {}
    factor, context = rope.number("factor"), rope.number("original_max_position_embeddings")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    with np.errstate(all="ignore"):
        wavelengths = 2 * math.pi * rope.base ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
        factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    if not np.isfinite(factors).all():
        raise ConvertError(f"config.json: rope settings {dict(rope.parameters)} give no finite frequency factors")
    return {"rope_freqs.weight": factors}


def head_metadata(config: HFConfig) -> Metadata:
    """Sizes of a head, where they are not the quotient of the others by definition."""
    return {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}


def interleaved(n_heads: Callable[[HFConfig], int]) -> RowOrder:
    """Rows of q or k for rotary pairs of neighbours, as GGUF's llama wants them; checkpoints pair half a head apart."""

    def order(config: HFConfig, rows: int) -> npt.NDArray[np.int64]:
        heads = n_heads(config)
        if rows % (2 * heads):
            raise ConvertError(f"config.json: {rows} rows do not part into {heads} heads of pairs")
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()

    return order


DECODER_KEYS: Mapping[str, KeyRule] = MappingProxyType(
    {
        "block_count": KeyRule("num_hidden_layers"),
        "context_length": KeyRule("max_position_embeddings"),
        "embedding_length": KeyRule("hidden_size"),
        "feed_forward_length": KeyRule("intermediate_size"),
        "attention.head_count": KeyRule("num_attention_heads"),
        "attention.head_count_kv": KeyRule("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": KeyRule("rms_norm_eps", is_float=True),
    }
)
DECODER_TENSORS: Mapping[str, TensorRule] = MappingProxyType(
    {
        "model.embed_tokens": TensorRule("token_embd"),
        "model.layers.{i}.input_layernorm": TensorRule("blk.{i}.attn_norm"),
        "model.layers.{i}.self_attn.q_proj": TensorRule("blk.{i}.attn_q"),
        "model.layers.{i}.self_attn.k_proj": TensorRule("blk.{i}.attn_k"),
        "model.layers.{i}.self_attn.v_proj": TensorRule("blk.{i}.attn_v"),
        "model.layers.{i}.self_attn.o_proj": TensorRule("blk.{i}.attn_output"),
        "model.layers.{i}.post_attention_layernorm": TensorRule("blk.{i}.ffn_norm"),
        "model.layers.{i}.mlp.gate_proj": TensorRule("blk.{i}.ffn_gate"),
        "model.layers.{i}.mlp.up_proj": TensorRule("blk.{i}.ffn_up"),
        "model.layers.{i}.mlp.down_proj": TensorRule("blk.{i}.ffn_down"),
        "model.norm": TensorRule("output_norm"),
        "lm_head": TensorRule("output"),  # not looked for where the embedding serves as output
    }
)
DECODER_RENAMES = (
    (r"^(?:model\.)?language_model\.(?=lm_head\.)", ""),  # a decoder inside of a model that sees or hears
    (r"^(?:language_model\.model|model\.language_model)\.", "model."),
    (r"^(?=(?:embed_tokens|layers|norm)\.)", "model."),  # a checkpoint without its head
)
DECODER_IGNORED = (r"\.rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$")


def without_feed_forward(tensors: Mapping[str, TensorRule]) -> dict[str, TensorRule]:
    """A decoder's tensors but for those of the feed-forward network, in whose place there are experts."""
    return {source: rule for source, rule in tensors.items() if ".mlp." not in source}
