"""Which type every tensor of a model gets, by the rules of llama.cpp's `llama-quant.cpp`.

A mix such as Q4_K_M spends more bits where errors cost most: the output matrix, `attn_v` and `ffn_down` of some layers.
Rows that do not fill a type's blocks get a type with smaller blocks. Only the shape and the name of a tensor count, so
a plan needs no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyinfer.convert.file_types import FileType
from pyinfer.errors import ConfigError
from pyinfer.quant.codecs import codec_by_name

QUANTIZED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TENSOR_TYPES = ("F32", "F16", "BF16", *QUANTIZED_TYPES)

_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_MIXTRAL = 8  # the number of experts that llama.cpp's rules for mixtures of experts were made for
_FINE_ATTN_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
_FINE_EXPERT_OUTPUT = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")

# Small or sensitive tensors that stay as they are, by a part of their name.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight|^token_types\.weight|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)


@dataclass(frozen=True)
class TensorSpec:
    """What a plan must know of a tensor."""

    name: str
    shape: tuple[int, ...]  # row-major: (rows, columns)
    codec: str  # what it is stored as, and stays if it is not to be quantized


@dataclass(frozen=True)
class ModelShape:
    """What the rules must know of a model; read from a GGUF's metadata by `model_shape`."""

    n_layers: int
    n_heads: int = 1
    n_kv_heads: int = 1
    n_experts: int = 0
    architecture: str = "llama"

    @property
    def heads_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0


@dataclass(frozen=True)
class PlanOptions:
    """What a user can override; types are names of `TENSOR_TYPES` in any case."""

    pure: bool = False  # every matrix gets the file type's own type
    output_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = field(default=())  # (regular expression, type); the first that fits
    has_imatrix: bool = False

    def __post_init__(self) -> None:
        for name in (self.output_type, self.token_embedding_type, *(t for _, t in self.tensor_types)):
            if name is not None and name.upper() not in TENSOR_TYPES:
                raise ConfigError(f"{name!r} is not a tensor type to quantize to; known: {', '.join(TENSOR_TYPES)}")
        for pattern, _ in self.tensor_types:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"tensor type pattern {pattern!r} is no regular expression: {error}") from None

    def override(self, name: str) -> str | None:
        """The type a user asked for by name, if any."""
        if self.token_embedding_type is not None and _category(name) == "token_embd":
            return self.token_embedding_type.upper()
        if self.output_type is not None and name == "output.weight":
            return self.output_type.upper()
        for pattern, type_name in self.tensor_types:
            if re.search(pattern, name):
                return type_name.upper()
        return None


@dataclass(frozen=True)
class PlannedType:
    codec: str
    wanted: str  # what the rules asked for; differs from `codec` where a row does not fill its blocks

    @property
    def is_fallback(self) -> bool:
        return self.codec != self.wanted


def plan_types(
    tensors: Iterable[TensorSpec], target: FileType, model: ModelShape, options: PlanOptions = PlanOptions()
) -> dict[str, PlannedType]:
    """The type of every tensor of a model, by name, in the order of `tensors`.

    The whole model is planned at once: a rule may ask for the how-manieth `attn_v` this is, and whether there is an
    `output.weight` or the token embeddings serve as one.
    """
    specs = list(tensors)
    rules = _Rules(target, model, options, specs)
    planned = {spec.name: rules.plan(spec) for spec in sorted(specs, key=_layer_order)}
    return {spec.name: planned[spec.name] for spec in specs}


def model_shape(metadata: Mapping[str, Any]) -> ModelShape:
    """What a GGUF's metadata says of its model; where a number differs by layer, the first layer's counts."""
    architecture = str(metadata.get("general.architecture", ""))

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}", default)
        return int(value if isinstance(value, int) else value[0])

    n_heads = number("attention.head_count", 1)
    return ModelShape(
        n_layers=number("block_count", 0),
        n_heads=n_heads,
        n_kv_heads=number("attention.head_count_kv", n_heads),
        n_experts=number("expert_count", 0),
        architecture=architecture,
    )


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of weights that a quantized file stores in a quantized type."""
    n_dims = max((i for i, size in enumerate(reversed(shape), 1) if size > 1), default=1)
    return n_dims >= 2 and name.endswith("weight") and not _KEPT.search(name)


def fitting_type(wanted: str, columns: int) -> str:
    """`wanted`, or the type that replaces it where rows of `columns` weights do not fill its blocks."""
    if columns % codec_by_name(wanted).block_size == 0:
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if columns % codec_by_name(smaller).block_size == 0 else "F16"


def _layer_order(spec: TensorSpec) -> tuple[int, str]:
    found = re.match(r"blk\.(\d+)\.", spec.name)
    return (int(found[1]) if found else -1, spec.name)


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    for part in ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight"):
        if part in name:
            return "attn_v"
    for part in ("attn_k.weight", "attn_q.weight", "attn_output.weight", "ffn_up", "ffn_gate", "ffn_down"):
        if part in name:
            return part.removesuffix(".weight")
    return "other"


class _Rules:
    """Counts the tensors of each kind in the order of the layers while it plans."""

    def __init__(self, target: FileType, model: ModelShape, options: PlanOptions, specs: list[TensorSpec]) -> None:
        self._target, self._model, self._options = target, model, options
        categories = [_category(spec.name) for spec in specs]
        self._is_tied = "output" not in categories
        self._n_attn_v = categories.count("attn_v")
        self._i_attn_v = self._i_ffn_down = 0

    def plan(self, spec: TensorSpec) -> PlannedType:
        if not is_quantizable(spec.name, spec.shape):
            return PlannedType(spec.codec, spec.codec)
        wanted = self._options.override(spec.name)
        if wanted is None:
            wanted = self._target.codec
            if wanted in QUANTIZED_TYPES and not self._options.pure:
                wanted = self._mix(spec, wanted)
        return PlannedType(fitting_type(wanted, spec.shape[-1]), wanted)

    def _mix(self, spec: TensorSpec, base: str) -> str:
        category = _category(spec.name)
        if category == "output" or (category == "token_embd" and self._is_tied):
            return self._output(spec, base)
        if category == "attn_v":
            self._i_attn_v += 1
            return self._attn_v(self._i_attn_v - 1, base)
        if category == "ffn_down":
            self._i_ffn_down += 1
            return self._ffn_down(self._layer(spec, self._i_ffn_down - 1), base)
        if category == "attn_k" and self._model.n_experts == _MIXTRAL:
            return "Q8_0"
        if category == "attn_output":
            if self._model.n_experts == _MIXTRAL:
                return "Q5_K" if self._target.name in _FINE_EXPERT_OUTPUT else base
            return _FINE_ATTN_OUTPUT.get(self._target.name, base)
        return base

    def _output(self, spec: TensorSpec, base: str) -> str:
        if self._is_tied and self._options.output_type is not None:
            return self._options.output_type.upper()
        if base == "Q8_0" or spec.shape[-1] % codec_by_name(base).block_size:
            return "Q8_0"
        return "Q6_K"

    def _attn_v(self, index: int, base: str) -> str:
        name, model = self._target.name, self._model
        wanted = base
        if name == "Q2_K":
            wanted = "Q4_K" if model.heads_per_kv >= 4 else "Q3_K"
        elif name == "Q2_K_S" and model.heads_per_kv >= 4:
            wanted = "Q4_K"
        elif name == "Q3_K_M":
            wanted = "Q5_K" if index < 2 else "Q4_K"
        elif name == "Q3_K_L" or (name == "Q4_K_S" and index < 4):
            wanted = "Q5_K"
        elif name in ("Q4_K_M", "Q5_K_M") and _is_sensitive(index, self._n_attn_v):
            wanted = "Q6_K"
        is_70b = model.architecture == "llama" and model.n_layers == 80 and model.n_heads != model.n_kv_heads
        if is_70b and wanted in ("Q3_K", "Q4_K"):
            wanted = "Q5_K"
        return "Q8_0" if model.n_experts == _MIXTRAL else wanted

    def _ffn_down(self, layer: int, base: str) -> str:
        name, n_layers = self._target.name, self._model.n_layers
        is_early = layer < n_layers // 8
        if name == "Q2_K":
            return "Q3_K"
        if name == "Q2_K_S":
            return "Q4_K" if is_early else base
        if name == "Q3_K_M":
            return "Q5_K" if layer < n_layers // 16 else "Q4_K"
        if name == "Q3_K_L":
            return "Q5_K"
        if name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _is_sensitive(layer, n_layers) else base
        if name == "Q4_K_S":
            return "Q5_K" if is_early else base
        if name in ("Q4_0", "Q5_0") and self._options.has_imatrix and is_early:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[name]
        return base

    def _layer(self, spec: TensorSpec, index: int) -> int:
        """Experts of one layer may be tensors of their own and lie anywhere, so there the name tells the layer."""
        return index if self._model.n_experts <= 1 else _layer_order(spec)[0]


def _is_sensitive(layer: int, n_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    first = n_layers // 8
    return layer < first or layer >= 7 * n_layers // 8 or (layer - first) % 3 == 2
