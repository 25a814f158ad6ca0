"""The families of mixtures of experts that can be converted: one table each, listed in `pyinfer.convert.families`.

A name with `{e}` is that of one expert's matrix; those of a layer become one tensor, as in llama.cpp's files.
"""

from __future__ import annotations

from pyinfer.convert.dense_families import LLAMA, QWEN3, qwen2_metadata
from pyinfer.convert.family import (
    DECODER_IGNORED,
    DECODER_KEYS,
    DECODER_RENAMES,
    DECODER_TENSORS,
    Family,
    KeyRule,
    Metadata,
    TensorRule,
    head_metadata,
    rope_metadata,
    without_feed_forward,
)
from pyinfer.convert.hf_config import HFConfig
from pyinfer.errors import ConvertError


def _mixtral_metadata(config: HFConfig) -> Metadata:
    values: Metadata = {**rope_metadata(config), "vocab_size": config.integer("vocab_size")}
    values["rope.dimension_count"] = config.head_dim
    return {**values, **(head_metadata(config) if config.get("head_dim") else {})}


_EXPERT_KEYS = {
    **DECODER_KEYS,
    "expert_count": KeyRule("num_local_experts", older="num_experts"),
    "expert_used_count": KeyRule("num_experts_per_tok"),
}
MIXTRAL = Family(
    arch="llama",
    hf_architectures=("MixtralForCausalLM",),
    tensors={
        **without_feed_forward(LLAMA.tensors),
        "model.layers.{i}.block_sparse_moe.gate": TensorRule("blk.{i}.ffn_gate_inp"),
        "model.layers.{i}.block_sparse_moe.experts.{e}.w1": TensorRule("blk.{i}.ffn_gate_exps"),
        "model.layers.{i}.block_sparse_moe.experts.{e}.w3": TensorRule("blk.{i}.ffn_up_exps"),
        "model.layers.{i}.block_sparse_moe.experts.{e}.w2": TensorRule("blk.{i}.ffn_down_exps"),
    },
    keys=_EXPERT_KEYS,
    activation="silu",
    renames=DECODER_RENAMES,
    ignored=DECODER_IGNORED,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
    },
    extra_metadata=_mixtral_metadata,
)


def _check_qwen_experts(config: HFConfig, *, normalized: bool) -> None:
    if config.get("mlp_only_layers") or (config.get("decoder_sparse_step") or 1) != 1:
        raise ConvertError(
            f"config.json: some layers are without experts ('mlp_only_layers' {config.get('mlp_only_layers')}, "
            f"'decoder_sparse_step' {config.get('decoder_sparse_step')}), which GGUF has no form for"
        )
    if bool(config.get("norm_topk_prob")) != normalized:
        raise ConvertError(
            f"config.json: 'norm_topk_prob' is {config.get('norm_topk_prob')}; GGUF's model of this kind has {normalized}"
        )


_QWEN_EXPERTS = {
    "model.layers.{i}.mlp.gate": TensorRule("blk.{i}.ffn_gate_inp"),
    "model.layers.{i}.mlp.experts.{e}.gate_proj": TensorRule("blk.{i}.ffn_gate_exps"),
    "model.layers.{i}.mlp.experts.{e}.up_proj": TensorRule("blk.{i}.ffn_up_exps"),
    "model.layers.{i}.mlp.experts.{e}.down_proj": TensorRule("blk.{i}.ffn_down_exps"),
}
_QWEN_EXPERT_KEYS = {
    **_EXPERT_KEYS,
    "expert_feed_forward_length": KeyRule("moe_intermediate_size"),
}
QWEN3_MOE = Family(
    arch="qwen3moe",
    hf_architectures=("Qwen3MoeForCausalLM",),
    tensors={**without_feed_forward(QWEN3.tensors), **_QWEN_EXPERTS},
    keys=_QWEN_EXPERT_KEYS,
    activation="silu",
    renames=DECODER_RENAMES,
    ignored=DECODER_IGNORED,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    extra_metadata=qwen2_metadata,
    check_more=lambda config: _check_qwen_experts(config, normalized=True),
)

_SHARED_EXPERT = {
    "model.layers.{i}.mlp.shared_expert_gate": TensorRule("blk.{i}.ffn_gate_inp_shexp"),
    "model.layers.{i}.mlp.shared_expert.gate_proj": TensorRule("blk.{i}.ffn_gate_shexp"),
    "model.layers.{i}.mlp.shared_expert.up_proj": TensorRule("blk.{i}.ffn_up_shexp"),
    "model.layers.{i}.mlp.shared_expert.down_proj": TensorRule("blk.{i}.ffn_down_shexp"),
}
QWEN2_MOE = Family(
    arch="qwen2moe",
    hf_architectures=("Qwen2MoeForCausalLM",),
    tensors={**without_feed_forward(DECODER_TENSORS), **_QWEN_EXPERTS, **_SHARED_EXPERT},
    keys={
        **_QWEN_EXPERT_KEYS,
        "expert_shared_feed_forward_length": KeyRule("shared_expert_intermediate_size"),
    },
    activation="silu",
    renames=DECODER_RENAMES,
    ignored=DECODER_IGNORED,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
    },
    extra_metadata=qwen2_metadata,
    check_more=lambda config: _check_qwen_experts(config, normalized=False),
)
