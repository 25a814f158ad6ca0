"""The op vocabulary: what a model is made of, independent of any device.

A `Value` is a matrix of rows; one row belongs to one token of the batch (`rows="tokens"`) or to one token whose logits
were asked for (`rows="outputs"`). Ops are frozen and refer to values, weights stay in their quantized form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pyinfer.graph.rope import Rope
from pyinfer.quant.tensor import QuantTensor

F32Array = npt.NDArray[np.float32]
Activation = Literal["silu", "gelu_tanh"]
Dtype = Literal["f32", "a8", "bf16"]


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A matrix [rows, width] that one op writes; identity is the object itself.

    dtype "a8" is the quantized activation: int8 with one float32 scale for each 32 columns (`graph.activation`);
    "bf16" is x rounded to bfloat16, where a device multiplies those.
    """

    name: str
    width: int
    rows: Literal["tokens", "outputs"] = "tokens"
    dtype: Dtype = "f32"


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """Base of all ops."""

    @property
    def inputs(self) -> tuple[Value, ...]:
        raise AssertionError(type(self))

    @property
    def outputs(self) -> tuple[Value, ...]:
        raise AssertionError(type(self))


@dataclass(frozen=True, slots=True, eq=False)
class Embed(Op):
    """out[m] = table[token_ids[m]] * scale."""

    out: Value
    table: QuantTensor  # (n_vocab, width)
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[Value, ...]:
        return ()

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class Hidden(Op):
    """out = batch.hidden: the rows that the stage before this one ended with. The first op of every stage but the first."""

    out: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return ()

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class RMSNorm(Op):
    """out = x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467), over groups of `weight.size` columns.

    A weight shorter than the row normalizes each head by itself (qwen3, gemma3). `out` may be "a8" or "bf16".
    """

    out: Value
    x: Value
    weight: F32Array
    eps: float

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class Quantize(Op):
    """out = x rounded to the dtype of out, "a8" or "bf16"."""

    out: Value
    x: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class MatMul(Op):
    """outs[i] = x @ weights[i].T + biases[i] (+ residual, only with a single output)."""

    outs: tuple[Value, ...]
    x: Value
    weights: tuple[QuantTensor, ...]  # (outs[i].width, x.width)
    biases: tuple[F32Array | None, ...]
    residual: Value | None = None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.outs


@dataclass(frozen=True, slots=True, eq=False)
class ApplyRope(Op):
    """out = x with each head of `head_dim` columns rotated to its token's position."""

    out: Value
    x: Value
    head_dim: int
    rope: Rope

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class StoreKV(Op):
    """Write this batch's keys and values of one layer into its pages; orders before the layer's `Attention`."""

    k: Value
    v: Value
    layer: int  # index into Graph.kv_layers

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.k, self.v)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return ()


@dataclass(frozen=True, slots=True, eq=False)
class Attention(Op):
    """out[m, h] = softmax(scale * q[m, h] . K) V over the pages of the token's sequence, causal, grouped heads.

    A layer with a window attends to positions p with 0 <= pos - p < window. `out` may be "a8" or "bf16".
    """

    out: Value
    q: Value
    layer: int  # index into Graph.kv_layers, which holds n_kv_heads, head_dim and window
    n_heads: int
    scale: float

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.q,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class GatedActivation(Op):
    """out = activation(gate) * up (arXiv:2002.05202). `out` may be "a8" or "bf16"."""

    out: Value
    gate: Value
    up: Value
    activation: Activation

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.gate, self.up)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class Add(Op):
    """out = a + b."""

    out: Value
    a: Value
    b: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.a, self.b)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)


@dataclass(frozen=True, slots=True, eq=False)
class SelectRows(Op):
    """out (rows="outputs") = x[batch.output_rows]: only these tokens go through what follows."""

    out: Value
    x: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.x,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.out,)
