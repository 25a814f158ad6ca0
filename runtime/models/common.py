"""What every architecture reads: typed metadata, tensors of a checked shape, sizes and rotary embedding.

Each missing or malformed key or tensor is one `ModelError` that names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ModelError
from pyinfer.graph.rope import Rope
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.tensor import QuantTensor

T = TypeVar("T", int, float)
F32Array = npt.NDArray[np.float32]
_FLOAT_TYPES = ("F32", "F16", "BF16")
_SCALINGS: dict[str, Literal["none", "linear", "yarn"]] = {"none": "none", "linear": "linear", "yarn": "yarn"}
_KEY_MAX = 2**31 - 1
_SOFTMAX = 1  # of `expert_gating_func`


class ModelReader:
    """Metadata and tensors of one GGUF under its architecture's prefix; remembers which tensors were taken."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file = file
        self.arch = arch
        self._taken: set[str] = set()

    def error(self, problem: str) -> ModelError:
        return ModelError(f"{self.file.path.name}: {problem}")

    def value(self, key: str) -> Any:
        """The raw value of `<arch>.<key>`, or None."""
        return self.file.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list with one entry a layer is taken when all entries are equal."""
        value = self.value(key)
        if value is None:
            return self._default(key, default)
        if isinstance(value, (list, np.ndarray)):
            values = [int(v) for v in value if isinstance(v, (int, np.integer))]
            if not values or len(values) != len(value) or min(values) != max(values):
                raise self.key_error(key, "differs between layers, which is not supported")
            value = values[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _KEY_MAX:
            raise self.key_error(key, f"is {value!r}; expected an integer from 1 to {_KEY_MAX}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of at least 0."""
        value = self.value(key)
        if value is None:
            return self._default(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
            raise self.key_error(key, f"is {value!r}; expected a finite number of at least 0")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.key_error(key, f"is {value!r}; expected a string")
        return value

    def reject_experts(self) -> None:
        if self.value("expert_count"):
            raise self.key_error(
                "expert_count", f"is {self.value('expert_count')}; {self.arch} models with experts are not supported"
            )

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def matrix(self, name: str, rows: int, cols: int) -> QuantTensor:
        """The weight (rows, cols), of a float type or of a supported block type."""
        return self._weight(name, (rows, cols))

    def _weight(self, name: str, shape: tuple[int, ...]) -> QuantTensor:
        tensor = self._tensor(name, shape)
        codec = tensor.codec
        if not codec.supported or (codec.block_size == 1 and codec.name not in _FLOAT_TYPES):
            raise self.error(f"tensor {name} is of type {codec.name}, which is not supported for weights")
        return tensor

    def row(self, name: str, width: int) -> QuantTensor:
        """The weight (1, width), which may be stored as a vector."""
        stored = self.file.tensors.get(name)
        tensor = self._weight(name, (width,) if stored is None or len(stored.shape) == 1 else (1, width))
        return replace(tensor, shape=(1, width), data=tensor.data.reshape(1, -1))

    def experts(self, name: str, n_experts: int, rows: int, cols: int) -> QuantTensor:
        """The weights (n_experts, rows, cols) of one matrix of every expert."""
        return self._weight(name, (n_experts, rows, cols))

    def vector(self, name: str, width: int) -> F32Array:
        """float32 [width] of a norm's weight or a bias."""
        tensor = self._tensor(name, (width,))
        if tensor.codec.name not in _FLOAT_TYPES:
            raise self.error(f"tensor {name} is of type {tensor.codec.name}; expected F32, F16 or BF16")
        return np.ascontiguousarray(tensor.dequantize().reshape(width))

    def optional_vector(self, name: str, width: int) -> F32Array | None:
        return self.vector(name, width) if self.has(name) else None

    def check_all_taken(self) -> None:
        """A tensor that no op uses would change what the model computes: refuse it rather than drop it."""
        left = [name for name in self.file.tensors if name not in self._taken]
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise self.error(f"tensor {left[0]}{more} is not part of a {self.arch} model as pyinfer knows it")

    def _tensor(self, name: str, shape: tuple[int, ...]) -> QuantTensor:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise self.error(f"tensor {name} is missing; a {self.arch} model needs it")
        if tensor.shape != shape:
            raise self.error(f"tensor {name} has shape {tensor.shape}; expected {shape}")
        self._taken.add(name)
        return tensor

    def _default(self, key: str, default: T | None) -> T:
        if default is None:
            raise self.error(f"metadata key {self.arch}.{key} is missing")
        return default

    def key_error(self, key: str, problem: str) -> ModelError:
        return self.error(f"metadata key {self.arch}.{key} {problem}")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that all decoder architectures share."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    eps: float  # of every RMSNorm

    @property
    def q_width(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.n_kv_heads * self.head_dim


def read_sizes(reader: ModelReader) -> Sizes:
    """Sizes from the metadata, checked against each other."""
    n_embd, n_heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    n_kv_heads = reader.integer("attention.head_count_kv", n_heads)
    head_dim = reader.integer("attention.key_length", max(1, n_embd // n_heads))
    value_dim = reader.integer("attention.value_length", max(1, n_embd // n_heads))
    if n_heads % n_kv_heads:
        raise reader.error(
            f"{n_heads} heads cannot share {n_kv_heads} key heads; the first must be a multiple of the second"
        )
    if value_dim != head_dim:
        raise reader.error(f"values of {value_dim} columns a head beside keys of {head_dim} are not supported")
    n_layers = reader.integer("block_count")
    if n_layers > len(reader.file.tensors):
        raise reader.error(f"{n_layers} layers cannot be made of {len(reader.file.tensors)} tensors")
    return Sizes(
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=reader.integer("feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_vocab=_n_vocab(reader),
        n_ctx_train=reader.integer("context_length"),
        eps=reader.number("attention.layer_norm_rms_epsilon"),
    )


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """A mixture of experts: `n_used` of `n_experts` feed-forward networks of width `n_ff` for each token."""

    n_experts: int
    n_used: int
    n_ff: int
    normalize: bool  # what the chosen ones weigh adds up to 1
    shared_n_ff: int | None = None  # the width of one more, which every token has


def read_experts(reader: ModelReader, n_ff: int, *, normalize: bool, has_shared: bool = False) -> ExpertSizes:
    """The sizes of the experts; `n_ff` is the width of those whose width is not in the metadata."""
    n_experts, n_used = reader.integer("expert_count"), reader.integer("expert_used_count")
    if reader.has("blk.0.ffn_gate.0.weight"):
        raise reader.error(
            "every expert is a tensor of its own, as in files of early 2024; convert the checkpoint anew"
        )
    if n_used > n_experts:
        raise reader.key_error("expert_used_count", f"is {n_used}; expected at most the {n_experts} experts there are")
    if reader.value("expert_gating_func") not in (None, _SOFTMAX):
        raise reader.key_error(
            "expert_gating_func", f"is {reader.value('expert_gating_func')}; supported: {_SOFTMAX} (softmax)"
        )
    shared = reader.integer("expert_shared_feed_forward_length", n_ff) if has_shared else None
    return ExpertSizes(n_experts, n_used, reader.integer("expert_feed_forward_length", n_ff), normalize, shared)


def _n_vocab(reader: ModelReader) -> int:
    """The tokenizer decides, as in llama.cpp; a file without one (a test's) is read by its embedding."""
    tokens = reader.file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    table = reader.file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise reader.error("tensor token_embd.weight is missing or no matrix")
    return table.shape[0]


def read_rope(reader: ModelReader, sizes: Sizes, pairing: Literal["interleaved", "half"]) -> Rope:
    """The rotary embedding of the metadata's `rope.*` keys; "linear" with factor 1 is the same as no scaling."""
    n_dims = reader.integer("rope.dimension_count", sizes.head_dim)
    if n_dims % 2 or n_dims > sizes.head_dim:
        raise reader.error(
            f"metadata key {reader.arch}.rope.dimension_count is {n_dims}; "
            f"expected an even number of at most {sizes.head_dim}"
        )
    base = reader.number("rope.freq_base", 10000.0)
    if base <= 1:
        raise reader.error(f"metadata key {reader.arch}.rope.freq_base is {base}; expected a number above 1")
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 1.0)) or 1.0
    factors = _rope_factors(reader, "rope_freqs.weight", n_dims)
    long_factors = _rope_factors(reader, "rope_factors_long.weight", n_dims)
    if long_factors is not None:
        factors = _rope_factors(reader, "rope_factors_short.weight", n_dims)
    kind = reader.text("rope.scaling.type", "linear")
    scaling = _SCALINGS.get(kind)
    if kind == "longrope" and long_factors is not None:
        scaling = "none"  # its factors are all there is to it
    if scaling is None:
        raise reader.key_error("rope.scaling.type", f"is {kind!r}; supported: {', '.join(_SCALINGS)}")
    return Rope(
        n_dims,
        pairing,
        base,
        scaling=scaling if factor != 1 or scaling == "yarn" else "none",
        factor=factor if scaling != "none" else 1.0,
        original_context=reader.integer("rope.scaling.original_context_length", sizes.n_ctx_train),
        attention_factor=reader.number("rope.scaling.attn_factor", 1.0),
        beta_fast=reader.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=reader.number("rope.scaling.yarn_beta_slow", 1.0),
        frequency_factors=factors,
        long_factors=long_factors,
    )


def _rope_factors(reader: ModelReader, name: str, n_dims: int) -> F32Array | None:
    factors = reader.optional_vector(name, n_dims // 2)
    if factors is not None and not (np.isfinite(factors).all() and factors.min() > 0):
        raise reader.error(f"tensor {name} holds a factor that is not a finite number above 0")
    return factors
