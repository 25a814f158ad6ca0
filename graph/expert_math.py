"""What the ops of a mixture of experts mean, in NumPy and float32: the part of the reference interpreter that is theirs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyinfer.graph.batch import Int32
from pyinfer.graph.ops import RouteExperts
from pyinfer.quant.tensor import QuantTensor

F32Array = npt.NDArray[np.float32]
SMALLEST_SUM = 2.0**-14  # what the chosen probabilities are divided by at least, as in llama.cpp


def softmax(scores: F32Array) -> F32Array:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: F32Array = weights / weights.sum(axis=-1, keepdims=True)
    return out


def sigmoid(x: F32Array) -> F32Array:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right 0
        out: F32Array = np.reciprocal(np.exp(-x) + np.float32(1))
    return out


def route(op: RouteExperts, logits: F32Array) -> tuple[Int32, F32Array]:
    """(experts [rows, n_used], weights [rows, n_used])."""
    scores = softmax(logits) if op.scoring == "softmax" else sigmoid(logits)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : op.n_used]
    weights = np.take_along_axis(scores, order, axis=1)
    if op.normalize:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), np.float32(SMALLEST_SUM))
    return order.astype(np.int32), weights * np.float32(op.scale)


def expert_matmul(x: F32Array, experts: Int32, weight: QuantTensor, kept: F32Array | None) -> F32Array:
    """`ExpertMatMul` of one tensor; `kept` is the tensor dequantized, if that is at hand."""
    _, n_out, n_in = weight.shape
    n_rows, n_used = experts.shape
    slots = np.broadcast_to(x.reshape(n_rows, x.shape[1] // n_in, n_in), (n_rows, n_used, n_in))
    out = np.empty((n_rows, n_used, n_out), np.float32)
    for expert in np.unique(experts):
        matrix = weight.part(expert * n_out, (expert + 1) * n_out).dequantize() if kept is None else kept[expert]
        chosen = experts == expert
        out[chosen] = slots[chosen] @ matrix.T
    return out.reshape(n_rows, n_used * n_out)


def combine(x: F32Array, weights: F32Array, residual: F32Array | None) -> F32Array:
    """`CombineExperts`."""
    n_rows, n_used = weights.shape
    slots = x.reshape(n_rows, n_used, x.shape[1] // n_used)
    out = np.zeros_like(slots[:, 0]) if residual is None else residual
    for s in range(n_used):
        out = out + weights[:, s : s + 1] * slots[:, s]
    return out
