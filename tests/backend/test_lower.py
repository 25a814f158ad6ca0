"""Lowering: buffers are not reused too early and barriers stand wherever one op needs another, in graphs of any form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch, one_table, run_prompt
from tiny_models import random_weights

from pyinfer.graph.backend import Stage, StageConfig
from pyinfer.graph.graph import Graph, KVLayer
from pyinfer.graph.kv_groups import MAX_GROUPS
from pyinfer.graph.ops import (
    Add,
    ApplyRope,
    Attention,
    CombineExperts,
    Embed,
    ExpertMatMul,
    GatedActivation,
    MatMul,
    Op,
    Quantize,
    RMSNorm,
    RouteExperts,
    SelectRows,
    StoreKV,
    Value,
)
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.rope import Rope
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_cpu.opcode import OpField
from pyinfer.kernels_cpu.stage import CPUStage
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.tensor import QuantTensor
from pyinfer.runtime.models.registry import build_graph

pytestmark = pytest.mark.backend

TinyModel = Callable[..., Path]
F32 = npt.NDArray[np.float32]
WIDTH, HEAD_DIM, N_VOCAB = 64, 16, 50
IDS: list[int] = np.random.RandomState(0).randint(0, N_VOCAB, 21).tolist()
PAGES = [2, 0]
ROPES = [Rope(HEAD_DIM, "half", 100.0), Rope(8, "interleaved", 10000.0)]


class RandomGraph:
    """Random ops over rows of 64 columns; values are read once, twice or long after they were written."""

    def __init__(self, seed: int, kind: str) -> None:
        self.rng = np.random.RandomState(seed)
        self.kind = kind
        self.ops: list[Op] = []
        self.layers: list[KVLayer] = []
        x = Value("embedding", WIDTH)
        self.ops.append(Embed(x, self.matrix(N_VOCAB)))
        self.values = [x]
        for _ in range(12):
            self.append(
                str(
                    self.rng.choice(
                        ["norm", "matmul", "residual", "several", "rope", "gate", "add", "attention", "experts"]
                    )
                )
            )
        selected = self.rng.choice(len(self.values), 2, replace=False)
        outs = [self.new("outputs") for _ in selected]
        self.ops += [SelectRows(out, self.values[i]) for out, i in zip(outs, selected, strict=True)]
        self.values = outs
        for _ in range(4):
            self.append(str(self.rng.choice(["norm", "matmul", "residual", "several", "gate", "add", "experts"])))
        total = self.values[0]
        for value in self.values[1:]:  # everything counts
            out = self.new("outputs")
            self.ops.append(Add(out, value, total) if self.rng.rand() < 0.5 else Add(out, total, value))
            total = out
        self.logits = Value("logits", N_VOCAB, "outputs")
        self.ops.append(MatMul((self.logits,), self.norm(total), (self.matrix(N_VOCAB),), (None,)))

    def graph(self) -> Graph:
        graph = Graph(tuple(self.ops), self.logits, tuple(self.layers), N_VOCAB, WIDTH, 128)
        graph.check()
        return graph

    def matrix(self, rows: int) -> QuantTensor:
        data = random_weights(self.kind, rows, WIDTH, self.rng, WIDTH**-0.5)
        return QuantTensor(
            "random", codec_by_name(self.kind), (rows, WIDTH), np.ascontiguousarray(data).reshape(rows, -1)
        )

    def new(self, rows: str = "tokens") -> Value:
        return Value(f"v{len(self.ops)}", WIDTH, rows)  # type: ignore[arg-type]

    def pick(self) -> Value:
        return self.values[self.rng.randint(len(self.values))]

    def norm(self, x: Value) -> Value:
        out = Value(f"{x.name}.norm", WIDTH, x.rows)
        # heads that are normed one by one are never quantized: they are rotated first
        size = HEAD_DIM if self.kind == "F32" and self.rng.rand() < 0.5 else WIDTH
        self.ops.append(RMSNorm(out, x, self.rng.uniform(0.5, 1.5, size).astype(np.float32), 1e-5))
        return out

    def append(self, what: str) -> None:
        x = self.pick()
        out = Value(f"v{len(self.ops)}.{what}", WIDTH, x.rows)
        bias = self.rng.standard_normal(WIDTH).astype(np.float32)
        if what == "norm":
            out = self.norm(x)
        elif what == "matmul":
            self.ops.append(MatMul((out,), self.norm(x), (self.matrix(WIDTH),), (bias,)))
        elif what == "residual":
            self.ops.append(MatMul((out,), self.norm(x), (self.matrix(WIDTH),), (None,), self.pick()))
        elif what == "several":
            other = Value(f"{out.name}.other", WIDTH, x.rows)
            weights = self.matrix(WIDTH), self.matrix(WIDTH)
            self.ops.append(MatMul((out, other), self.norm(x), weights, (None, bias)))
            self.values.append(other)
        elif what == "rope":
            self.ops.append(ApplyRope(out, x, HEAD_DIM, ROPES[self.rng.randint(2)]))
        elif what == "gate":
            activation = ("silu", "gelu_tanh")[self.rng.randint(2)]
            self.ops.append(GatedActivation(out, self.norm(x), self.norm(self.pick()), activation))  # type: ignore[arg-type]
        elif what == "add":
            self.ops.append(Add(out, x, self.pick()))
        elif what == "experts":
            self.experts(out, self.norm(x))
        else:
            layer = len(self.layers)
            window = (None, 5)[self.rng.randint(2)]
            self.layers.append(KVLayer(WIDTH // HEAD_DIM, HEAD_DIM, window))
            self.ops += [
                StoreKV(self.norm(self.pick()), self.norm(self.pick()), layer),
                Attention(out, x, layer, WIDTH // HEAD_DIM, 0.25),
            ]
        self.values.append(out)

    def experts(self, out: Value, x: Value) -> None:
        """Two of five for each row; half of the time they add to another value."""
        logits = Value(f"{out.name}.logits", 5, x.rows)
        experts, weights = Value(f"{out.name}.experts", 2, x.rows, "i32"), Value(f"{out.name}.weights", 2, x.rows)
        up, down = Value(f"{out.name}.up", 2 * WIDTH, x.rows), Value(f"{out.name}.down", 2 * WIDTH, x.rows)
        residual = self.pick() if self.rng.rand() < 0.5 else None
        self.ops += [
            MatMul((logits,), x, (self.matrix(5),), (None,)),
            RouteExperts(experts, weights, logits, normalize=bool(self.rng.rand() < 0.5)),
            ExpertMatMul((up,), x, experts, (self.expert_tensor(),)),
            ExpertMatMul((down,), up, experts, (self.expert_tensor(),)),
            CombineExperts(out, down, weights, residual),
        ]

    def expert_tensor(self) -> QuantTensor:
        flat = self.matrix(5 * WIDTH)
        return replace(flat, shape=(5, WIDTH, WIDTH))


def config(n_threads: int) -> StageConfig:
    return StageConfig(n_pages=3 * MAX_GROUPS, kv_dtype="f32", n_ctx=32, max_tokens=32, n_threads=n_threads)


def run(stage: Stage, graph: Graph) -> F32:
    """Half of the prompt, and from there the rest but for two rows' logits."""
    pages = [[3 * group + page for page in PAGES] for group in range(len(graph.kv_groups))]
    stage.run(make_batch([Piece(IDS[:11], pages)], 16, outputs=[]))
    return stage.run(make_batch([Piece(IDS[11:], pages, 11)], 16, outputs=[0, 2, 3, 5, 6, 7, 8, 9])).copy()


def shuffle_between_barriers(stage: CPUStage, rng: np.random.RandomState) -> int:
    """Put the ops between two barriers in another order, as threads may run them; returns how many changed place."""
    ops = stage._program.ops
    starts = np.flatnonzero(ops[:, OpField.BARRIER])
    moved = 0
    for start, end in pairwise([0, *starts, len(ops)]):
        order = rng.permutation(np.arange(start, end))
        moved += int((order != np.arange(start, end)).sum())
        waits = ops[start:end, OpField.BARRIER].copy()
        ops[start:end] = ops[order]
        ops[start:end, OpField.BARRIER] = waits
    return moved


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_equal_the_reference(seed: int) -> None:
    graph = RandomGraph(seed, "F32").graph()
    if seed % 2:
        graph = optimize(graph)
    expected = run(ReferenceBackend().open_stage(graph, config(1)), graph)
    stage = CPUBackend().open_stage(graph, config(1 + seed % 3))
    try:
        logits = run(stage, graph)
    finally:
        stage.close()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("seed", range(10))
def test_ops_between_barriers_may_run_in_any_order(seed: int, kind: str) -> None:
    graph = optimize(RandomGraph(seed, kind).graph())
    stage = CPUBackend().open_stage(graph, config(1))
    try:
        expected = run(stage, graph)
        for i in range(4):
            shuffle_between_barriers(stage, np.random.RandomState(i))
            np.testing.assert_array_equal(run(stage, graph), expected)
    finally:
        stage.close()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "qwen2moe", "qwen3moe"])
def test_models_may_run_in_any_order_between_barriers(arch: str, tiny_model: TinyModel) -> None:
    graph = one_table(optimize(build_graph(GGUFFile.open(tiny_model(arch, "Q8_0")))))
    ids = np.random.RandomState(1).randint(0, 300, 40).tolist()
    stage = CPUBackend().open_stage(graph, StageConfig(n_pages=3, n_ctx=48, max_tokens=48))
    try:
        expected = run_prompt(stage, ids, [1, 0, 2], 16)
        moved = 0
        for i in range(4):
            moved += shuffle_between_barriers(stage, np.random.RandomState(i))
            np.testing.assert_array_equal(run_prompt(stage, ids, [1, 0, 2], 16, 17), expected)
        assert moved, "nothing runs side by side"
    finally:
        stage.close()


def test_quantizing_by_itself(tiny_model: TinyModel) -> None:
    """A value that float and quantized weights read is kept in both forms."""
    kinds = {"attn_q": "F32", "ffn_up": "F16"}
    path = tiny_model("llama", lambda name: next((kind for part, kind in kinds.items() if part in name), "Q8_0"))
    graph = optimize(build_graph(GGUFFile.open(path)))
    assert any(isinstance(op, Quantize) for op in graph.ops)
    ids = np.random.RandomState(1).randint(0, 300, 10).tolist()
    stage = CPUBackend().open_stage(graph, config(2))
    reference = ReferenceBackend().open_stage(graph, config(1))
    try:
        batch = make_batch([Piece([token], [i % 3]) for i, token in enumerate(ids[:3])], 16)
        expected = reference.run(batch)
        assert np.median(np.abs(stage.run(batch) - expected).max(1)) < 1e-5 * np.abs(expected).max()
    finally:
        stage.close()
