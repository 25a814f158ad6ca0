"""The NumPy interpreter: what every op means, in float32 throughout. The oracle for every kernel; clear before fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.graph.activation import quantize_activation
from pyinfer.graph.backend import PageData, Progress, StageConfig, split_kv_dtype
from pyinfer.graph.batch import Batch, Int32, Rows
from pyinfer.graph.expert_math import combine, expert_matmul, route, sigmoid, softmax
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import (
    Activation,
    Add,
    AllReduce,
    ApplyRope,
    Attention,
    CombineExperts,
    Embed,
    ExpertMatMul,
    GatedActivation,
    GatherColumns,
    Hidden,
    MatMul,
    Op,
    Quantize,
    RMSNorm,
    RouteExperts,
    SelectRows,
    StoreKV,
    Value,
)
from pyinfer.graph.rope import Rope
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor

F32Array = npt.NDArray[np.float32]


class ReferenceBackend:
    """Runs any graph, optimized or not, on plain NumPy."""

    name = "reference"

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> ReferenceStage:
        return ReferenceStage(graph, config, progress)


class ReferenceStage:
    """Float32 copies of all weights and the pages of keys and values."""

    def __init__(
        self,
        graph: Graph,
        config: StageConfig,
        progress: Progress | None = None,
        *,
        keep_weights: bool = True,
        all_reduce: Callable[[F32Array], F32Array] | None = None,
    ) -> None:
        """Without `keep_weights` a weight is dequantized at every use: slower, and in the memory of one matrix.

        `all_reduce` gives the sum of what the ranks of a tensor split call it with.
        """
        graph.check()
        self._all_reduce = all_reduce
        self._graph = graph
        self._config = config
        self._weights = _dequantize_weights(graph, progress) if keep_weights else {}
        self._dtypes = split_kv_dtype(config.kv_dtype)
        self._places = graph.kv_places
        shapes = [(config.n_pages, config.block_size, layer.n_kv_heads, layer.head_dim) for layer in graph.page_layers]
        self._keys, self._values = (
            [np.zeros(shape, np.float16 if dtype == "f16" else np.float32) for shape in shapes]
            for dtype in self._dtypes
        )

    def run(self, batch: Batch) -> F32Array:
        """Logits float32 [n_outputs, n_vocab]."""
        return self.run_part(batch)[0]

    def run_part(self, batch: Batch) -> tuple[Rows, ...]:
        """See `graph.backend.PartStage`."""
        self._check(batch)
        rows, hidden = _Rows(self._graph), iter(batch.hidden)
        for index, op in enumerate(self._graph.ops):
            if isinstance(op, Hidden):
                rows[op.out] = next(hidden)
            else:
                self._execute(op, batch, rows)
            rows.forget(index)
        return tuple(rows[value] for value in self._graph.results)

    def observe(self, batch: Batch, on_input: Callable[[QuantTensor, F32Array, Int32 | None], None]) -> None:
        """Run all but the output matrix, and tell of each tensor before it: its input, and the experts of each row."""
        self._check(batch)
        rows = _Rows(self._graph)
        for index, op in enumerate(self._graph.ops):
            if self._graph.logits in op.outputs:
                return
            if isinstance(op, MatMul | ExpertMatMul):
                for weight in op.weights:
                    on_input(weight, rows[op.x], rows[op.experts] if isinstance(op, ExpertMatMul) else None)
            self._execute(op, batch, rows)
            rows.forget(index)

    def _check(self, batch: Batch) -> None:
        batch.check(
            n_vocab=self._graph.n_vocab,
            n_pages=self._config.n_pages,
            block_size=self._config.block_size,
            n_groups=len(self._graph.kv_groups),
        )

    def copy_page(self, source: int, target: int) -> None:
        for pages in (*self._keys, *self._values):
            pages[target] = pages[source]

    def read_pages(self, pages: Sequence[int]) -> PageData:
        parts = [pool[list(pages)].reshape(len(pages), -1).view(np.uint8) for pool in (*self._keys, *self._values)]
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(pages), 0), np.uint8)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        start = 0
        for pool in (*self._keys, *self._values):
            end = start + pool[0].nbytes
            pool[list(pages)] = np.ascontiguousarray(data[:, start:end]).view(pool.dtype).reshape(-1, *pool.shape[1:])
            start = end

    def close(self) -> None:
        self._weights.clear()
        self._keys.clear()
        self._values.clear()

    def _execute(self, op: Op, batch: Batch, rows: _Rows) -> None:
        match op:
            case Embed():
                rows[op.out] = op.table.dequantize(batch.token_ids) * np.float32(op.scale)
            case RMSNorm():
                rows[op.out] = rms_norm(rows[op.x], op.weight, op.eps)
            case Quantize():
                rows[op.out] = rows[op.x]
            case MatMul():
                for out, weight, bias in zip(op.outs, op.weights, op.biases, strict=True):
                    kept = self._weights.get(id(weight))
                    y = rows[op.x] @ (weight.dequantize() if kept is None else kept).T
                    if bias is not None:
                        y = y + bias
                    rows[out] = y if op.residual is None else y + rows[op.residual]
            case ApplyRope():
                rows[op.out] = apply_rope(rows[op.x], op.head_dim, op.rope, batch.positions)
            case StoreKV():
                group, place = self._places[op.layer]
                self._store(self._keys[place], kept_as(self._dtypes[0], rows[op.k]), batch.slots[group])
                self._store(self._values[place], kept_as(self._dtypes[1], rows[op.v]), batch.slots[group])
            case Attention():
                rows[op.out] = self._attend(op, rows[op.q], batch)
            case GatedActivation():
                rows[op.out] = activate(rows[op.gate], op.activation) * rows[op.up]
            case Add():
                rows[op.out] = rows[op.a] + rows[op.b]
            case RouteExperts():
                rows[op.experts], rows[op.weights] = route(op, rows[op.logits])
            case ExpertMatMul():
                for out, weight in zip(op.outs, op.weights, strict=True):
                    kept = self._weights.get(id(weight))
                    rows[out] = expert_matmul(rows[op.x], rows[op.experts], weight, kept)
            case CombineExperts():
                rows[op.out] = combine(rows[op.x], rows[op.weights], None if op.residual is None else rows[op.residual])
            case AllReduce():
                assert self._all_reduce is not None
                rows[op.out] = self._all_reduce(rows[op.x])
            case GatherColumns():
                assert self._all_reduce is not None
                own = np.zeros((len(rows[op.x]), op.out.width), np.float32)
                own[:, op.rank * op.x.width :][:, : op.x.width] = rows[op.x]
                rows[op.out] = self._all_reduce(own)
            case SelectRows():
                rows[op.out] = rows[op.x][batch.output_rows]
            case _:
                raise AssertionError(f"no meaning for {type(op).__name__}")

    def _store(self, pages: npt.NDArray[np.floating], x: F32Array, slots: Int32) -> None:
        page, offset = np.divmod(slots, self._config.block_size)
        pages[page, offset] = x.reshape(len(x), *pages.shape[2:])

    def _attend(self, op: Attention, q: F32Array, batch: Batch) -> F32Array:
        layer = self._graph.kv_layers[op.layer]
        group, place = self._places[op.layer]
        out = np.empty_like(q)
        for s in range(batch.n_sequences):
            tokens = slice(int(batch.sequence_starts[s]), int(batch.sequence_starts[s + 1]))
            positions = batch.positions[tokens]
            n, block_size = int(positions[-1]) + 1, self._config.block_size
            first = max(0, int(positions[0]) + 1 - (layer.window or n)) // block_size  # pages before it are not ours
            table = batch.page_tables[group, s, first : -(-n // block_size)]
            k, v = (
                pool[place][table].reshape(-1, layer.n_kv_heads, layer.head_dim)[: n - first * block_size]
                for pool in (self._keys, self._values)
            )
            k, v = k.astype(np.float32), v.astype(np.float32)
            distance = positions[:, None] - np.arange(first * block_size, n)[None, :]
            visible = (distance >= 0) & (distance < (layer.window or n + 1))
            heads = q[tokens].reshape(len(positions), op.n_heads, layer.head_dim)
            for h in range(op.n_heads):
                shared = h * layer.n_kv_heads // op.n_heads
                scores = (heads[:, h] @ k[:, shared].T) * np.float32(op.scale)
                weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
                columns = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
                out[tokens, columns] = weights @ v[:, shared]
        return out


class _Rows:
    """The values of one run; a rounded value is held as the float32 that it stands for."""

    def __init__(self, graph: Graph) -> None:
        self._arrays: dict[int, npt.NDArray[Any]] = {}
        self._last_use: dict[int, list[int]] = {}  # op index -> ids of the values that nothing later reads
        last = {id(value): index for index, op in enumerate(graph.ops) for value in (*op.inputs, *op.outputs)}
        last.update((id(value), len(graph.ops)) for value in graph.results)
        for value_id, index in last.items():
            self._last_use.setdefault(index, []).append(value_id)

    def __getitem__(self, value: Value) -> npt.NDArray[Any]:
        return self._arrays[id(value)]

    def __setitem__(self, value: Value, array: npt.NDArray[Any]) -> None:
        assert array.shape[1] == value.width, value.name
        assert array.dtype == (np.int32 if value.dtype == "i32" else np.float32), value.name
        if value.dtype == "a8":
            array = quantize_activation(array).dequantize()
        self._arrays[id(value)] = kept_as("bf16", array) if value.dtype == "bf16" else array

    def forget(self, index: int) -> None:
        for value_id in self._last_use.get(index, ()):
            del self._arrays[value_id]


def kept_as(dtype: str, x: F32Array) -> F32Array:
    """What memory of this type gives back for x, float32; the pool of pages rounds float16 by itself."""
    if dtype in ("f16", "f32"):
        return x
    codec = codec_by_name(dtype.upper())
    return codec.dequantize(codec.quantize(x))


def rms_norm(x: F32Array, weight: F32Array, eps: float) -> F32Array:
    """x / sqrt(mean(x^2) + eps) * weight, over groups of weight.size columns."""
    groups = x.reshape(len(x), x.shape[1] // weight.size, weight.size)
    mean_square = np.mean(groups * groups, axis=2, keepdims=True)
    out: F32Array = groups / np.sqrt(mean_square + np.float32(eps)) * weight
    return out.reshape(x.shape)


def apply_rope(x: F32Array, head_dim: int, rope: Rope, positions: npt.NDArray[np.int32]) -> F32Array:
    """Rotate the first `rope.n_dims` columns of each head; the others pass."""
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    cos, sin = np.moveaxis(rope.cos_sin(positions)[:, None], -1, 0)  # each [n, 1, n_dims/2]
    half = rope.n_dims // 2
    if rope.pairing == "half":
        first, second = slice(0, half), slice(half, rope.n_dims)
    else:
        first, second = slice(0, rope.n_dims, 2), slice(1, rope.n_dims, 2)
    out = heads.copy()
    out[..., first] = heads[..., first] * cos - heads[..., second] * sin
    out[..., second] = heads[..., first] * sin + heads[..., second] * cos
    return out.reshape(x.shape)


def activate(x: F32Array, activation: Activation) -> F32Array:
    """SiLU (arXiv:1702.03118) or the tanh form of GELU (arXiv:1606.08415)."""
    if activation == "silu":
        gate = sigmoid(x)
    else:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        gate = (np.tanh(inner) + np.float32(1)) / np.float32(2)
    out: F32Array = x * gate
    return out


def _dequantize_weights(graph: Graph, progress: Progress | None) -> dict[int, F32Array]:
    tensors: dict[int, QuantTensor] = {
        id(w): w for op in graph.ops if isinstance(op, MatMul | ExpertMatMul) for w in op.weights
    }
    weights = {}
    for done, (key, tensor) in enumerate(tensors.items()):
        if progress is not None:
            progress("loading weights", done / len(tensors))
        weights[key] = tensor.dequantize()
    return weights
