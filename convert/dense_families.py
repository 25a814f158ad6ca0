"""The families of dense models that can be converted: one table each, listed in `pyinfer.convert.families`.

Names and transforms are those of llama.cpp's `convert_hf_to_gguf.py`, so that its files and ours are the same.
"""

from __future__ import annotations

import math

import numpy as np

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
    interleaved,
    llama3_factors,
    rope_metadata,
)
from pyinfer.convert.hf_config import HFConfig
from pyinfer.errors import ConvertError
from pyinfer.quant.codec import FloatArray


def _llama_metadata(config: HFConfig) -> Metadata:
    return {
        **rope_metadata(config, "llama3"),
        **head_metadata(config),
        "vocab_size": config.integer("vocab_size"),
        "rope.dimension_count": config.head_dim,
    }


LLAMA = Family(
    arch="llama",
    hf_architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "LlamaModel"),
    tensors={
        **DECODER_TENSORS,
        "model.layers.{i}.self_attn.q_proj": TensorRule("blk.{i}.attn_q", interleaved(lambda c: c.n_heads)),
        "model.layers.{i}.self_attn.k_proj": TensorRule("blk.{i}.attn_k", interleaved(lambda c: c.n_kv_heads)),
    },
    keys=DECODER_KEYS,
    activation="silu",
    renames=DECODER_RENAMES,
    ignored=DECODER_IGNORED,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    extra_metadata=_llama_metadata,
    extra_tensors=llama3_factors,
)


def qwen2_metadata(config: HFConfig) -> Metadata:
    return {**rope_metadata(config), **(head_metadata(config) if config.get("head_dim") else {})}


QWEN2 = Family(
    arch="qwen2",
    hf_architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    tensors=DECODER_TENSORS,
    keys=DECODER_KEYS,
    activation="silu",
    renames=DECODER_RENAMES,
    ignored=DECODER_IGNORED,
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
    extra_metadata=qwen2_metadata,
)

QWEN3 = Family(
    arch="qwen3",
    hf_architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    tensors={
        **DECODER_TENSORS,
        "model.layers.{i}.self_attn.q_norm": TensorRule("blk.{i}.attn_q_norm"),
        "model.layers.{i}.self_attn.k_norm": TensorRule("blk.{i}.attn_k_norm"),
    },
    keys=DECODER_KEYS,
    activation="silu",
    renames=DECODER_RENAMES,
    ignored=DECODER_IGNORED,
    defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "head_dim": 128},
    extra_metadata=qwen2_metadata,
)


_N_LAYERS_27B = 62  # the one size whose queries are scaled by hidden size / heads, not by the size of a head


def _gemma3_metadata(config: HFConfig) -> Metadata:
    values: Metadata = {**rope_metadata(config), **head_metadata(config)}
    if config.get("attn_logit_softcapping"):
        raise ConvertError("config.json: 'attn_logit_softcapping' is set, which Gemma 3 does not have")
    if config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = np.float32(config.number("final_logit_softcapping"))
    per_head = config.integer("hidden_size") // config.n_heads
    scale = per_head if config.integer("num_hidden_layers") == _N_LAYERS_27B else config.head_dim
    if config.number("query_pre_attn_scalar") != scale:
        raise ConvertError(
            f"config.json: 'query_pre_attn_scalar' is {config.get('query_pre_attn_scalar')}; GGUF's gemma3 has {scale}"
        )
    n_layers, period = config.integer("num_hidden_layers"), config.integer("sliding_window_pattern", 6)
    types = config.get("layer_types")
    is_local = [(i + 1) % period != 0 for i in range(n_layers)]
    if isinstance(types, list) and len(types) == n_layers:
        is_local = [kind == "sliding_attention" for kind in types]
    if any(is_local):
        values["attention.sliding_window"] = config.integer("sliding_window")
        if is_local != [(i + 1) % 6 != 0 for i in range(n_layers)]:
            values["attention.sliding_window_pattern"] = np.array(is_local)
    return values


_GEMMA3_NORMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMA3 = Family(
    arch="gemma3",
    hf_architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    tensors={
        **DECODER_TENSORS,
        # Gemma's norms multiply by 1 + weight
        **{
            f"model.layers.{{i}}.{source}": TensorRule(f"blk.{{i}}.{target}", offset=1.0)
            for source, target in _GEMMA3_NORMS.items()
        },
        "model.norm": TensorRule("output_norm", offset=1.0),
    },
    keys=DECODER_KEYS,
    activation="gelu_pytorch_tanh",
    renames=DECODER_RENAMES,
    ignored=(*DECODER_IGNORED, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    defaults={
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    },
    extra_metadata=_gemma3_metadata,
    adds_space=False,
)


def _phi3_rotated(config: HFConfig) -> int:
    share = config.rope().number("partial_rotary_factor", 1.0)
    return int(share * config.integer("hidden_size")) // config.n_heads


def _phi3_context(config: HFConfig) -> int:
    default = config.integer("max_position_embeddings")
    return int(config.rope().number("original_max_position_embeddings", default))


def _phi3_metadata(config: HFConfig) -> Metadata:
    rope = config.rope()
    if rope.kind not in ("default", "longrope", "su", "yarn"):  # the last two are older names of longrope
        raise ConvertError(f"config.json: rope type {rope.kind!r} is not supported here; supported: default, longrope")
    window = config.get("sliding_window")
    values: Metadata = {
        "rope.freq_base": np.float32(rope.base),
        "rope.dimension_count": _phi3_rotated(config),
        "rope.scaling.original_context_length": _phi3_context(config),
        "attention.sliding_window": 0 if window is None else window,  # 0 tells Phi-4 from the others
    }
    if rope.parameters.get("long_factor"):
        context = _phi3_context(config)
        stretch = config.integer("max_position_embeddings") / context
        factor = math.sqrt(1 + math.log(stretch) / math.log(context)) if stretch > 1 else 1.0
        values["rope.scaling.attn_factor"] = np.float32(factor)
    return values


def _phi3_factors(config: HFConfig) -> dict[str, FloatArray]:
    parameters = config.rope().parameters
    if not parameters.get("long_factor"):
        return {}
    wanted = _phi3_rotated(config) // 2
    tensors = {}
    for name in ("long", "short"):
        factors = np.asarray(parameters.get(f"{name}_factor") or [], np.float32)
        if factors.shape != (wanted,):
            raise ConvertError(f"config.json: rope '{name}_factor' has {factors.size} values; expected {wanted}")
        tensors[f"rope_factors_{name}.weight"] = factors
    return tensors


PHI3 = Family(
    arch="phi3",
    hf_architectures=("Phi3ForCausalLM",),
    tensors={
        "model.embed_tokens": TensorRule("token_embd"),
        "model.layers.{i}.input_layernorm": TensorRule("blk.{i}.attn_norm"),
        "model.layers.{i}.self_attn.qkv_proj": TensorRule("blk.{i}.attn_qkv"),
        "model.layers.{i}.self_attn.o_proj": TensorRule("blk.{i}.attn_output"),
        "model.layers.{i}.post_attention_layernorm": TensorRule("blk.{i}.ffn_norm"),
        "model.layers.{i}.mlp.gate_up_proj": TensorRule("blk.{i}.ffn_up"),
        "model.layers.{i}.mlp.down_proj": TensorRule("blk.{i}.ffn_down"),
        "model.norm": TensorRule("output_norm"),
        "lm_head": TensorRule("output"),
    },
    keys=DECODER_KEYS,
    activation="silu",
    renames=DECODER_RENAMES,
    ignored=DECODER_IGNORED,
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    extra_metadata=_phi3_metadata,
    extra_tensors=_phi3_factors,
)


def _bert_metadata(config: HFConfig) -> Metadata:
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ConvertError(f"config.json: 'position_embedding_type' is {kind!r}; GGUF's bert has 'absolute' only")
    return {"attention.causal": False}


BERT = Family(
    arch="bert",
    hf_architectures=("BertModel", "BertForMaskedLM"),
    tensors={
        "embeddings.word_embeddings": TensorRule("token_embd"),
        "embeddings.position_embeddings": TensorRule("position_embd"),
        "embeddings.token_type_embeddings": TensorRule("token_types"),
        "embeddings.LayerNorm": TensorRule("token_embd_norm"),
        "encoder.layer.{i}.attention.self.query": TensorRule("blk.{i}.attn_q"),
        "encoder.layer.{i}.attention.self.key": TensorRule("blk.{i}.attn_k"),
        "encoder.layer.{i}.attention.self.value": TensorRule("blk.{i}.attn_v"),
        "encoder.layer.{i}.attention.output.dense": TensorRule("blk.{i}.attn_output"),
        "encoder.layer.{i}.attention.output.LayerNorm": TensorRule("blk.{i}.attn_output_norm"),
        "encoder.layer.{i}.intermediate.dense": TensorRule("blk.{i}.ffn_up"),
        "encoder.layer.{i}.output.dense": TensorRule("blk.{i}.ffn_down"),
        "encoder.layer.{i}.output.LayerNorm": TensorRule("blk.{i}.layer_output_norm"),
    },
    keys={
        "block_count": KeyRule("num_hidden_layers"),
        "context_length": KeyRule("max_position_embeddings"),
        "embedding_length": KeyRule("hidden_size"),
        "feed_forward_length": KeyRule("intermediate_size"),
        "attention.head_count": KeyRule("num_attention_heads"),
        "attention.layer_norm_epsilon": KeyRule("layer_norm_eps", is_float=True),
    },
    activation="gelu",
    renames=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    ignored=(r"^embeddings\.position_ids$", r"^pooler\.", r"^cls\.(predictions|seq_relationship)\b"),
    defaults={"max_position_embeddings": 512, "layer_norm_eps": 1e-12, "tie_word_embeddings": True},
    extra_metadata=_bert_metadata,
    vocabulary="wordpiece",
)
