"""What the GPU backend does on the host: buckets, the step's arrays, parts of a batch, groups of ops, reuse of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import Piece, make_batch
from gpu_shapes import RecordingDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Add, ApplyRope, Attention, MatMul, SelectRows, StoreKV
from pyinfer.graph.passes import optimize
from pyinfer.kernels_gpu import route_measure
from pyinfer.kernels_gpu.batch_parts import split_batch
from pyinfer.kernels_gpu.buckets import bucket_of, output_buckets, sequence_buckets, token_buckets
from pyinfer.kernels_gpu.fusion import AttentionGroup, NormGroup, group_ops
from pyinfer.kernels_gpu.launch import Buffer, Gemm, Launch
from pyinfer.kernels_gpu.lower import lower
from pyinfer.kernels_gpu.operand import operand_at, operand_bytes
from pyinfer.kernels_gpu.program import ProgramShape
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.kernels_gpu.step_buffer import StepBuffer, StepFields
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = pytest.mark.unit

CONFIG = StageConfig(n_pages=64, max_tokens=40, max_sequences=6, n_ctx=128)


class HostDevice(RecordingDevice):
    """Uploads go to one array, so that what kernels would read can be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.memory_of = np.full(1 << 16, 0x7F, np.uint8)
        self.uploaded: list[int] = []
        self._start = self._end

    def upload(self, target: Buffer, source: np.ndarray[Any, Any], offset: int = 0) -> None:
        start = target.at(offset, source.nbytes).ptr - self._start
        self.memory_of[start : start + source.nbytes] = source.view(np.uint8).reshape(-1)
        self.uploaded.append(source.nbytes)

    def ints(self, buffer: Buffer, n: int) -> list[int]:
        start = buffer.ptr - self._start
        values: list[int] = self.memory_of[start : start + 4 * n].view(np.int32).tolist()
        return values


# ---- buckets
@pytest.mark.parametrize("max_tokens", [1, 3, 8, 40, 256, 300, 512, 2048, 5000])
def test_every_number_of_rows_has_a_bucket(max_tokens: int) -> None:
    tokens = token_buckets(max_tokens)
    assert list(tokens) == sorted(set(tokens)) and tokens[-1] == max_tokens
    for n in range(1, max_tokens + 1):
        bucket = bucket_of(n, tokens)
        assert n <= bucket <= max(8, 1.5 * n + 1)
        outputs = output_buckets(bucket)
        assert outputs[0] == 0 and outputs[-1] == bucket and list(outputs) == sorted(set(outputs))
    assert sequence_buckets(max_tokens)[-1] == max_tokens


def test_few_rows_are_not_padded() -> None:
    assert [bucket_of(n, token_buckets(512)) for n in range(1, 9)] == list(range(1, 9))


# ---- the step's arrays
def test_a_step_is_padded() -> None:
    device = HostDevice()
    step = StepBuffer(device, CONFIG, 2)
    batch = make_batch([Piece([5, 6, 7], [[3, 4], [8, 9]], 15), Piece([9], [[1], [2]])], 16, [2, 3])
    step.upload(batch, 6, 4)
    first, second = step.fields(0), step.fields(1)
    assert device.ints(first.token_ids, 6) == [5, 6, 7, 9, -1, -1]
    assert device.ints(first.positions, 6) == [15, 16, 17, 0, 0, 0]
    assert device.ints(first.sequence_of_token, 6) == [0, 0, 0, 1, -1, -1]
    assert device.ints(first.output_rows, 4) == [2, 3, -1, -1]
    assert device.ints(first.sequence_starts, 7) == [0, 3, 4, 4, 4, 4, 4]
    assert device.ints(first.slots, 6) == [63, 64, 65, 16, -1, -1]
    assert device.ints(second.slots, 6) == [143, 144, 145, 32, -1, -1]
    assert first.table_stride == 8
    assert device.ints(first.page_tables, 2) == [3, 4] and device.ints(second.page_tables, 2) == [8, 9]
    assert device.ints(first.page_tables.at(4 * 8), 1) == [1] and device.ints(second.page_tables.at(4 * 8), 1) == [2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 2**31))
def test_tables_are_right_though_only_changes_travel(steps: list[list[int]], seed: int) -> None:
    """A step is a list of sequences, each by its number of pages; the tables of most steps resemble the one before."""
    rng, device = np.random.default_rng(seed), HostDevice()
    step = StepBuffer(device, CONFIG, 1)
    tables = rng.integers(0, 64, (6, 8))
    for sizes in steps:
        tables[rng.integers(6), rng.integers(8)] = rng.integers(64)
        pieces = [Piece([1], tables[s, :n].tolist(), 16 * n - 1) for s, n in enumerate(sizes)]
        step.upload(make_batch(pieces, 16), 6, 6)
        for s, n in enumerate(sizes):
            held = device.ints(step.fields(0).page_tables.at(4 * 8 * s), n)
            assert held == tables[s, :n].tolist()


def test_tables_that_stay_do_not_travel() -> None:
    device = HostDevice()
    step = StepBuffer(device, CONFIG, 1)
    batch = make_batch([Piece([5], [3, 4], 15), Piece([9], [1])], 16)
    step.upload(batch, 2, 2)
    device.uploaded.clear()
    step.upload(batch, 2, 2)
    assert len(device.uploaded) == 1


# ---- a batch in parts
def test_parts_of_a_batch_tell_the_same_story() -> None:
    pieces = [Piece(list(range(20)), [[3, 4], [10, 11]], 5), Piece([9], [[1], [2]]), Piece(list(range(7)), [[6], [7]])]
    whole = make_batch(pieces, 16, [0, 1, 3, 18, 19, 20, 22, 25])
    parts = list(split_batch(whole, 3))
    for part in parts:
        part.check(n_vocab=100, n_pages=64, block_size=16, n_groups=2)
        assert 0 < len(part.output_rows) <= 3
    starts = np.cumsum([0, *(part.n_tokens for part in parts)])
    outputs = [part.output_rows + start for part, start in zip(parts, starts, strict=False)]
    assert np.concatenate(outputs).tolist() == whole.output_rows.tolist()
    for name in ("token_ids", "positions"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()
    assert (np.concatenate([part.slots for part in parts], axis=1) == whole.slots).all()


@pytest.mark.parametrize("rows", ["tokens", "outputs"])
def test_parts_of_what_the_stage_before_gave(rows: str) -> None:
    whole = make_batch([Piece(list(range(9)), [3])], 16, [1, 2, 8])
    hidden = np.arange(9 if rows == "tokens" else 3, dtype=np.float32)[:, None]
    batch = Batch(**{name: getattr(whole, name) for name in Batch.__slots__} | {"hidden": (hidden,)})
    parts = [part.hidden[0] for part in split_batch(batch, 2)]
    assert np.concatenate(parts).tolist() == hidden.tolist()


# ---- groups of ops
def graph_of(tiny_model: Callable[..., Path], arch: str) -> Graph:
    return optimize(build_graph(GGUFFile.open(tiny_model(arch, "Q8_0"))))


@pytest.mark.parametrize("arch, norms", [("llama", 0), ("qwen2", 0), ("qwen3", 0), ("gemma3", 4)])
def test_what_is_lowered_together(arch: str, norms: int, tiny_model: Callable[..., Path]) -> None:
    graph = graph_of(tiny_model, arch)
    groups = group_ops(graph)
    assert sorted(id(op) for group in groups for op in group.ops) == sorted(id(op) for op in graph.ops)
    attention = [group for group in groups if isinstance(group, AttentionGroup)]
    assert len(attention) == 2 and sum(isinstance(group, NormGroup) for group in groups) == norms
    single = {type(op) for group in groups if len(group.ops) == 1 for op in group.ops}
    assert not single & {ApplyRope, StoreKV, Attention, Add}
    for group in attention:
        assert (group.q_norm is not None) == (arch in ("qwen3", "gemma3")) and group.rope is not None
    for norm in (group for group in groups if isinstance(group, NormGroup)):
        assert norm.before is not None and norm.norm.x is norm.add.out


def test_what_others_read_stays_apart(tiny_model: Callable[..., Path]) -> None:
    """A rotated query that something else reads too is a value of its own."""
    graph = graph_of(tiny_model, "qwen3")
    rope = next(op for op in graph.ops if isinstance(op, ApplyRope))
    position = graph.ops.index(rope) + 1
    extra = SelectRows(type(rope.out)("extra", rope.out.width, "outputs"), rope.out)
    changed = Graph(
        (*graph.ops[:position], extra, *graph.ops[position:]), graph.logits, graph.kv_layers, graph.n_vocab,
        graph.n_embd, graph.n_ctx_train,
    )  # fmt: skip
    groups = group_ops(changed)
    assert sum(isinstance(group, AttentionGroup) for group in groups) == 1
    assert any(group.ops == (rope,) for group in groups)


# ---- memory
def overlapping(a: Buffer, b: Buffer) -> bool:
    return a.ptr < b.ptr + b.n_bytes and b.ptr < a.ptr + a.n_bytes


def test_parts_of_an_operand_lie_apart() -> None:
    for form, n_parts in (("f32", 1), ("a8", 3), ("h16", 2)):
        n_bytes = operand_bytes(form, 3, 96)  # type: ignore[arg-type]
        operand = operand_at(form, 3, 96, Buffer(4096, n_bytes))  # type: ignore[arg-type]
        parts = [part for part in (operand.data, operand.scales, operand.sums) if part is not None]
        assert len(parts) == n_parts and all(part.ptr % 256 == 0 for part in parts)
        assert not any(overlapping(a, b) for i, a in enumerate(parts) for b in parts[:i])


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_smaller_programs_fit_where_the_largest_does(arch: str, tiny_model: Callable[..., Path]) -> None:
    memory = StageMemory(RecordingDevice(), graph_of(tiny_model, arch), CONFIG)
    lower(memory, ProgramShape("mixed", 40, 40, 6))
    assert memory.workspace.slabs
    sizes = [slab.n_bytes for slab in memory.workspace.slabs]
    again = lower(memory, ProgramShape("mixed", 40, 40, 6))
    lower(memory, ProgramShape("prompt", 24, 1, 1))
    assert [slab.n_bytes for slab in memory.workspace.slabs] == sizes
    assert any(overlapping(again.result, slab) for slab in memory.workspace.slabs)


def test_float_types_that_share_a_product_go_their_own_ways(tiny_model: Callable[..., Path]) -> None:
    """Few rows in one launch; of many float16 goes to the tensor cores and float32 to cuBLAS, whichever is the first."""
    for first, second in (("F16", "F32"), ("F32", "F16")):
        path = tiny_model("llama", lambda name, a=first, b=second: a if "attn_q" in name else b)
        memory = StageMemory(RecordingDevice(), optimize(build_graph(GGUFFile.open(path))), CONFIG)
        (qkv, *_) = (op for op in memory.graph.ops if isinstance(op, MatMul) and len(op.outs) == 3)
        assert {weight.codec.name for weight in qkv.weights} == {"F16", "F32"}
        few, many = (lower(memory, ProgramShape("prompt", n, 1, 1)).steps for n in (8, 24))
        assert not any(isinstance(step, Gemm) for step in few)
        assert {step.kind for step in many if isinstance(step, Gemm)} == {"f32"}
        assert any(isinstance(step, Launch) and step.kernel.name == "matmul_mma" for step in many)
        assert {problem.kind for problem, _ in route_measure._problems(memory, 24)} == {"F16"}


def test_without_outputs_the_head_is_left_out(tiny_model: Callable[..., Path]) -> None:
    memory = StageMemory(RecordingDevice(), graph_of(tiny_model, "llama"), CONFIG)
    some, none = (lower(memory, ProgramShape("prompt", 24, n, 1)) for n in (1, 0))
    assert none.result.n_bytes == 0 and len(none.steps) < len(some.steps) - 6


def test_fields_of_groups_differ_in_slots_and_tables_only() -> None:
    step = StepBuffer(RecordingDevice(), CONFIG, 2)
    first, second = step.fields(0), step.fields(1)
    differing = {name for name in StepFields.__slots__ if getattr(first, name) != getattr(second, name)}
    assert differing == {"slots", "page_tables"}
