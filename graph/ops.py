"""The op vocabulary: what a model is made of, independent of any device.

A `Value` is a matrix of rows; one row belongs to one token of the batch (`rows="tokens"`) or to one token whose logits
were asked for (`rows="outputs"`). Ops are frozen and refer to values, weights stay in their quantized form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pyinfer.graph.rope import Rope
from pyinfer.quant.tensor import QuantTensor

F32Array = npt.NDArray[np.float32]
Activation = Literal["silu", "gelu_tanh"]
Dtype = Literal["f32", "a8", "bf16", "i32"]


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A matrix [rows, width] that one op writes; identity is the object itself.

    dtype "a8" is the quantized activation: int8 with one float32 scale for each 32 columns (`graph.activation`);
    "bf16" is x rounded to bfloat16, where a device multiplies those. "i32" holds the numbers of experts.
    A row that holds something for each of a token's `n_used` experts has slot s in columns s*w to (s+1)*w - 1.
    """

    name: str
    width: int
    rows: Literal["tokens", "outputs"] = "tokens"
    dtype: Dtype = "f32"


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """Base of all ops. `READS` and `WRITES` name the fields that hold values: one, several, or None."""

    READS: ClassVar[tuple[str, ...]] = ()
    WRITES: ClassVar[tuple[str, ...]] = ("out",)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self._values(self.READS)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self._values(self.WRITES)

    def _values(self, names: tuple[str, ...]) -> tuple[Value, ...]:
        found: list[Value] = []
        for name in names:
            held: Value | tuple[Value, ...] | None = getattr(self, name)
            if held is not None:
                found += held if isinstance(held, tuple) else (held,)
        return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Embed(Op):
    """out[m] = table[token_ids[m]] * scale."""

    out: Value
    table: QuantTensor  # (n_vocab, width)
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Hidden(Op):
    """out = batch.hidden[i], for the i-th `Hidden` of a graph: rows of a stage before. They are a graph's first ops."""

    out: Value


@dataclass(frozen=True, slots=True, eq=False)
class RMSNorm(Op):
    """out = x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467), over groups of `weight.size` columns.

    A weight shorter than the row normalizes each head by itself (qwen3, gemma3). `out` may be "a8" or "bf16".
    """

    READS = ("x",)

    out: Value
    x: Value
    weight: F32Array
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Quantize(Op):
    """out = x rounded to the dtype of out, "a8" or "bf16"."""

    READS = ("x",)

    out: Value
    x: Value


@dataclass(frozen=True, slots=True, eq=False)
class MatMul(Op):
    """outs[i] = x @ weights[i].T + biases[i] (+ residual, only with a single output)."""

    READS = ("x", "residual")
    WRITES = ("outs",)

    outs: tuple[Value, ...]
    x: Value
    weights: tuple[QuantTensor, ...]  # (outs[i].width, x.width)
    biases: tuple[F32Array | None, ...]
    residual: Value | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ApplyRope(Op):
    """out = x with each head of `head_dim` columns rotated to its token's position."""

    READS = ("x",)

    out: Value
    x: Value
    head_dim: int
    rope: Rope


@dataclass(frozen=True, slots=True, eq=False)
class StoreKV(Op):
    """Write this batch's keys and values of one layer into its pages; orders before the layer's `Attention`."""

    READS = ("k", "v")
    WRITES = ()

    k: Value
    v: Value
    layer: int  # index into Graph.kv_layers


@dataclass(frozen=True, slots=True, eq=False)
class Attention(Op):
    """out[m, h] = softmax(scale * q[m, h] . K) V over the pages of the token's sequence, causal, grouped heads.

    A layer with a window attends to positions p with 0 <= pos - p < window. `out` may be "a8" or "bf16".
    """

    READS = ("q",)

    out: Value
    q: Value
    layer: int  # index into Graph.kv_layers, which holds n_kv_heads, head_dim and window
    n_heads: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class GatedActivation(Op):
    """out = activation(gate) * up (arXiv:2002.05202). `out` may be "a8" or "bf16"."""

    READS = ("gate", "up")

    out: Value
    gate: Value
    up: Value
    activation: Activation


@dataclass(frozen=True, slots=True, eq=False)
class RouteExperts(Op):
    """The experts of each token (mixture of experts, arXiv:1701.06538) and what their results weigh.

    p = softmax(logits), or the sigmoid of each; experts = the `n_used` largest of p in descending order, ties to the lower
    number; weights = p of those, divided by their sum if `normalize` (a sum below 2^-14 counts as that), times `scale`.
    """

    READS = ("logits",)
    WRITES = ("experts", "weights")

    experts: Value  # i32, width n_used
    weights: Value  # f32, width n_used
    logits: Value  # width: the number of experts
    normalize: bool
    scale: float = 1.0
    scoring: Literal["softmax", "sigmoid"] = "softmax"

    @property
    def n_used(self) -> int:
        return self.experts.width


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMatMul(Op):
    """outs[i], slot s = x @ weights[i][experts[:, s]].T, where x is one row for all slots, or has a slot for each."""

    READS = ("x", "experts")
    WRITES = ("outs",)

    outs: tuple[Value, ...]
    x: Value
    experts: Value
    weights: tuple[QuantTensor, ...]  # (n_experts, outs[i].width / n_used, x.width or x.width / n_used)

    @property
    def n_used(self) -> int:
        return self.experts.width


@dataclass(frozen=True, slots=True, eq=False)
class CombineExperts(Op):
    """out = residual (if there is one) + the sum over the slots, in ascending order, of weights[:, s] * slot s of x."""

    READS = ("x", "weights", "residual")

    out: Value
    x: Value
    weights: Value  # f32, width n_used
    residual: Value | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Add(Op):
    """out = a + b."""

    READS = ("a", "b")

    out: Value
    a: Value
    b: Value


@dataclass(frozen=True, slots=True, eq=False)
class AllReduce(Op):
    """out = the sum of the ranks' x, the same on each; for graphs that `graph.tensor_split` made."""

    READS = ("x",)

    out: Value
    x: Value


@dataclass(frozen=True, slots=True, eq=False)
class GatherColumns(Op):
    """out = the ranks' x side by side, the same on each; for graphs that `graph.tensor_split` made."""

    READS = ("x",)

    out: Value
    x: Value  # of width out.width / number of ranks
    rank: int  # whose columns x is


@dataclass(frozen=True, slots=True, eq=False)
class SelectRows(Op):
    """out (rows="outputs") = x[batch.output_rows]: only these tokens go through what follows."""

    READS = ("x",)

    out: Value
    x: Value
