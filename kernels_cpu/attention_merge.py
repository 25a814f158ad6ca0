"""Merging the partitions of a sequence whose attention was shared out in spans."""

from __future__ import annotations

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention
from pyinfer.kernels_cpu.attention_args import MASKED, PARTITION, AttentionArg
from pyinfer.kernels_cpu.attention_rows import merge_sums
from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, i32, i64

MAX_SPLIT_TOKENS = 8  # of a step that is cut into spans; with more there is enough to share out


class Partials:
    """Where spans leave their partitions: float32 [MAX_SPLIT_TOKENS][heads][max_partitions][head_dim + 2], touched lazily."""

    def __init__(self, graph: Graph, config: StageConfig) -> None:
        self.max_partitions = -(-config.n_ctx // PARTITION)
        layers = graph.kv_layers
        widths = [op.n_heads * (layers[op.layer].head_dim + 2) for op in graph.ops if isinstance(op, Attention)]
        self._memory = allocate(4 * MAX_SPLIT_TOKENS * self.max_partitions * max(widths, default=1))

    @property
    def address(self) -> int:
        return address(self._memory)


def merge_body(head_dim: int) -> Body:
    """A task is one head of one token: its partitions in ascending order, as `attention` merges them by itself."""

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        n_heads = e.mul(e.field(op, AttentionArg.N_KV_HEADS), e.field(op, AttentionArg.GROUP))
        record_bytes = 4 * (head_dim + 2)
        positions = e.ptr(e.field(step, StepField.POSITIONS))
        partials, out = e.ptr(e.field(op, AttentionArg.PARTIALS)), e.ptr(e.field(op, AttentionArg.OUT))
        row_bytes = e.mul(e.field(op, AttentionArg.MAX_PARTITIONS), record_bytes)
        n_vectors = head_dim // e.L
        with e.loop(last, first) as task:
            token, head = b.sdiv(task, n_heads), b.srem(task, n_heads)
            position = b.sext(e.load(e.at(positions, e.mul(token, 4)), i32, 4), i64)
            low = e.max(b.sub(e.add(position, 1), e.field(op, AttentionArg.WINDOW)), 0)
            row = e.at(partials, b.mul(task, row_bytes))
            maximum, total = e.var(e.floats(MASKED)), e.var(e.floats(0.0))
            values = [e.var(e.floats(0.0)) for _ in range(n_vectors)]
            end = e.add(b.sdiv(position, e.c(PARTITION)), 1)
            with e.loop(end, b.sdiv(low, e.c(PARTITION))) as partition:
                record = e.at(row, e.mul(partition, record_bytes))
                top, part = (e.splat_float(e.at(record, 4 * (head_dim + i))) for i in range(2))
                keep, take = merge_sums(e, maximum, total, top, part)
                for v, slot in enumerate(values):
                    new = e.load(e.at(record, 4 * e.L * v), e.vf, 4)
                    e.set(slot, e.fma(e.get(slot), keep, b.fmul(new, take)))
            target = e.at(e.at(out, b.mul(token, e.field(op, AttentionArg.OUT_STRIDE))), e.mul(head, 4 * head_dim))
            for v, slot in enumerate(values):
                e.store(b.fdiv(e.get(slot), e.get(total)), e.at(target, 4 * e.L * v), 4)

    return body
