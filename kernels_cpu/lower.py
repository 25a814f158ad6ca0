"""Lowering: a graph becomes a table of op records over fixed buffers, with barriers only where one op needs another's result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ModelError
from pyinfer.graph.backend import StageConfig, split_kv_dtype
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import (
    Add,
    ApplyRope,
    Attention,
    Embed,
    ExpertMatMul,
    GatedActivation,
    Hidden,
    MatMul,
    Op,
    Quantize,
    RMSNorm,
    SelectRows,
    StoreKV,
    Value,
)
from pyinfer.graph.rope import Rope
from pyinfer.kernels_cpu.attention import attention_body
from pyinfer.kernels_cpu.attention_args import AttentionArg
from pyinfer.kernels_cpu.attention_merge import Partials, merge_body
from pyinfer.kernels_cpu.buffers import Buffer, BufferPlan
from pyinfer.kernels_cpu.compiler import Compiler
from pyinfer.kernels_cpu.float_bits import float_bits
from pyinfer.kernels_cpu.kv_store import StoreArg, store_kv_body
from pyinfer.kernels_cpu.lower_experts import ExpertRules, read_by_experts_only
from pyinfer.kernels_cpu.matmul_bfloat import BFLOAT_PAIRS
from pyinfer.kernels_cpu.matmul_block import ROW_BLOCK_BYTES, MatMulArg
from pyinfer.kernels_cpu.matmul_float import FLOAT_BYTES
from pyinfer.kernels_cpu.matmul_types import BLOCK_SOURCES
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import OP_WORDS, OpField, StepField
from pyinfer.kernels_cpu.pages import KVPages
from pyinfer.kernels_cpu.repack import EmbedArg
from pyinfer.kernels_cpu.rope_kernel import RopeArg, rope_body
from pyinfer.kernels_cpu.rope_tables import RopeTables
from pyinfer.kernels_cpu.row_ops import RowArg, add_body, gated_body, quantize_body, rms_norm_body, select_rows_body
from pyinfer.kernels_cpu.weight_format import ROWS
from pyinfer.kernels_cpu.weights import WeightArena, check_supported, embed_kernel, matmul_kernel

_NO_WINDOW = 1 << 40
_PART_BLOCKS = 16  # 32-column blocks that are worth a task of their own


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    records: npt.NDArray[np.int64]  # [n_ops, OP_WORDS]
    results: list[Buffer]  # of `Graph.results`
    hidden: list[Buffer]  # to be filled before a run, one for each `Hidden`
    keep: list[Any]  # what must be kept alive for the addresses to hold


def lower(
    graph: Graph,
    config: StageConfig,
    compiler: Compiler,
    weights: WeightArena,
    pages: KVPages,
    ropes: RopeTables,
    free: list[npt.NDArray[np.uint8]] | None = None,
) -> Lowered:
    """`free`: memory that values may lie in, and where theirs goes once it is not needed; results keep theirs."""
    for index, layer in enumerate(graph.kv_layers):
        if layer.head_dim % 16:
            raise ModelError(
                f"attention layer {index} has heads of {layer.head_dim} columns; the CPU kernels need a multiple of 16"
            )
    lowering = _Lowering(graph, config, compiler, weights, pages, ropes, free)
    for op in graph.ops:
        lowering.lower(op)
    return Lowered(
        lowering.finish(), [lowering.buffers[value] for value in graph.results], lowering.hidden, lowering.keep
    )


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        config: StageConfig,
        compiler: Compiler,
        weights: WeightArena,
        pages: KVPages,
        ropes: RopeTables,
        free: list[npt.NDArray[np.uint8]] | None,
    ) -> None:
        self.graph, self.config, self.compiler = graph, config, compiler
        self.weights, self.pages, self.ropes = weights, pages, ropes
        self.buffers = BufferPlan(graph, config.max_tokens, free)
        self.partials = Partials(graph, config)
        self.keep: list[Any] = [self.buffers, self.partials]
        self.hidden: list[Buffer] = []
        self._records: list[npt.NDArray[np.int64]] = []
        self._pending_reads: set[int] = set()
        self._pending_writes: set[int] = set()
        experts = ExpertRules(self.buffers, config.max_tokens, weights, compiler, self._emit)
        self.keep.append(experts.keep)
        self._any_width = read_by_experts_only(graph)
        self._rules: dict[type[Op], Callable[[Any], None]] = {
            Embed: self._embed,
            Hidden: self._hidden,
            RMSNorm: self._rms_norm,
            Quantize: self._quantize,
            MatMul: self._matmul,
            ApplyRope: self._rope,
            StoreKV: self._store_kv,
            Attention: self._attention,
            GatedActivation: self._gated,
            Add: self._add,
            SelectRows: self._select_rows,
            **experts.rules,
        }

    def lower(self, op: Op) -> None:
        for value in op.outputs:
            if value.width % 16 and id(value) not in self._any_width:
                raise ModelError(f"{value.name} is {value.width} wide; the CPU kernels need a multiple of 16")
        self._rules[type(op)](op)
        self.buffers.read(*op.inputs)

    def finish(self) -> npt.NDArray[np.int64]:
        return np.array(self._records, np.int64).reshape(-1, OP_WORDS)

    # ---- records
    def _emit(
        self,
        kernel: int,
        tasks: int,
        per: StepField,
        arguments: Mapping[Any, int],
        *,
        reads: Iterable[int],
        writes: Iterable[int],
        optional: bool = False,
    ) -> None:
        """Append one record, with a barrier if it depends on anything since the last one.

        An optional record, or one for each output, may have no tasks in a step; its barrier then does not happen, so nothing
        can count on it.
        """
        reads, writes = set(reads), set(writes)
        record = np.zeros(OP_WORDS, np.int64)
        if reads & self._pending_writes or writes & (self._pending_writes | self._pending_reads):
            record[OpField.BARRIER] = 1
            if not optional and per is not StepField.N_OUTPUTS:
                self._pending_reads, self._pending_writes = set(), set()
        self._pending_reads |= reads
        self._pending_writes |= writes
        record[OpField.KERNEL], record[OpField.TASKS], record[OpField.TASKS_PER] = kernel, tasks, per
        for field, value in arguments.items():
            record[field] = value
        self._records.append(record)

    @staticmethod
    def _rows(value: Value) -> StepField:
        return StepField.N_TOKENS if value.rows == "tokens" else StepField.N_OUTPUTS

    def _floats(self, array: npt.NDArray[np.float32]) -> int:
        """The address of a padded copy of a norm weight or bias."""
        copy = allocate(-(-array.size // 16) * 64).view(np.float32)
        copy[: array.size] = array.ravel()
        self.keep.append(copy)
        return address(copy)

    def _row_op(
        self, name: str, body: Any, x: Buffer, out: Buffer, value: Value, *, parts: int = 1, **more: int
    ) -> None:
        """A record of `row_ops`; `more` holds further RowArg words by lower-case name."""
        arguments: dict[IntEnum, int] = {
            RowArg.X: x.address, RowArg.X_STRIDE: x.stride, RowArg.OUT: out.address, RowArg.OUT_STRIDE: out.stride,
            RowArg.WIDTH: value.width, RowArg.N_PARTS: parts, RowArg.ROWS_FIELD: self._rows(value),
        }  # fmt: skip
        arguments |= {RowArg[key.upper()]: word for key, word in more.items()}
        reads = {x.address} | ({more["y"]} if "y_stride" in more else set())
        self._emit(
            self.compiler.kernel(name, body), 1 if name.startswith("rms_norm") else parts, self._rows(value), arguments,
            reads=reads, writes={out.address},
        )  # fmt: skip

    @staticmethod
    def _parts_of(width: int) -> int:
        return max(1, width // 32 // _PART_BLOCKS)

    # ---- one rule an op
    def _embed(self, op: Embed) -> None:
        table, kind = op.table, op.table.codec.name
        check_supported(table)
        self.keep.append(table)
        out = self.buffers.write(op.out)
        block = 16 if kind in FLOAT_BYTES else BLOCK_SOURCES[kind].format.columns
        arguments: dict[IntEnum, int] = {
            EmbedArg.TABLE: address(table.data), EmbedArg.ROW_BYTES: table.data.shape[-1],
            EmbedArg.OUT: out.address, EmbedArg.OUT_STRIDE: out.stride,
            EmbedArg.N_BLOCKS: table.shape[-1] // block, EmbedArg.SCALE: float_bits(op.scale),
        }  # fmt: skip
        kernel = embed_kernel(self.compiler, kind)
        self._emit(kernel, 1, StepField.N_TOKENS, arguments, reads=(), writes={out.address})

    def _hidden(self, op: Hidden) -> None:
        """No record: the stage fills the buffer before a run. Nothing is lowered before it, so nothing shares it yet."""
        assert not self._records
        self.hidden.append(self.buffers.write(op.out))

    def _rms_norm(self, op: RMSNorm) -> None:
        x, out = self.buffers[op.x], self.buffers.write(op.out)
        groups = op.x.width // op.weight.size
        assert op.out.dtype == "f32" or groups == 1
        group = Value(op.out.name, op.weight.size, op.out.rows, op.out.dtype)
        name = f"rms_norm_{op.out.dtype}"
        weight, eps = self._floats(op.weight), float_bits(op.eps)
        self._row_op(name, rms_norm_body(op.out.dtype), x, out, group, parts=groups, y=weight, eps=eps)

    def _quantize(self, op: Quantize) -> None:
        self._quantize_into(self.buffers[op.x], op.out)

    def _quantize_into(self, x: Buffer, value: Value) -> None:
        out = self.buffers.write(value)
        name = "quantize" if value.dtype == "a8" else f"quantize_{value.dtype}"
        self._row_op(name, quantize_body(value.dtype), x, out, value, parts=self._parts_of(value.width))

    def _gated(self, op: GatedActivation) -> None:
        gate, up, out = self.buffers[op.gate], self.buffers[op.up], self.buffers.write(op.out)
        name = f"{op.activation}_{op.out.dtype}"
        body = gated_body(op.activation, op.out.dtype)
        if op.out.width % 32:
            raise ModelError(f"{op.out.name} is {op.out.width} wide; the CPU kernels need a multiple of 32")
        parts = self._parts_of(op.out.width)
        self._row_op(name, body, gate, out, op.out, parts=parts, y=up.address, y_stride=up.stride)

    def _add(self, op: Add) -> None:
        a, b = self.buffers[op.a], self.buffers[op.b]
        out = self.buffers.write_over(op.out, op.a)
        self._row_op("add", add_body(), a, out, op.out, y=b.address, y_stride=b.stride)

    def _select_rows(self, op: SelectRows) -> None:
        self._row_op("select_rows", select_rows_body(), self.buffers[op.x], self.buffers.write(op.out), op.out)

    def _matmul(self, op: MatMul) -> None:
        x, rows = self.buffers[op.x], self._rows(op.outs[0])
        for weight, bias, value in zip(op.weights, op.biases, op.outs, strict=True):
            kind, packed = weight.codec.name, self.weights[weight]
            assert (kind not in FLOAT_BYTES) == (op.x.dtype == "a8"), (kind, op.x.dtype)
            assert (packed.kind == BFLOAT_PAIRS) == (op.x.dtype == "bf16"), (packed.kind, op.x.dtype)
            residual = None if op.residual is None else self.buffers[op.residual]
            out = self.buffers.write(value) if op.residual is None else self.buffers.write_over(value, op.residual)
            arguments: dict[IntEnum, int] = {
                MatMulArg.WEIGHTS: self.weights.address(weight), MatMulArg.GROUP_BYTES: packed.group_bytes,
                MatMulArg.N_RECORDS: packed.n_records, MatMulArg.X: x.address, MatMulArg.X_ROW_BYTES: x.stride,
                MatMulArg.OUT: out.address, MatMulArg.OUT_STRIDE: out.stride,
                MatMulArg.BIAS: 0 if bias is None else self._floats(bias),
                MatMulArg.RESIDUAL: residual.address if residual else 0,
                MatMulArg.RESIDUAL_STRIDE: residual.stride if residual else 0,
                MatMulArg.ROWS_FIELD: rows, MatMulArg.ROW_BLOCK: max(8, ROW_BLOCK_BYTES // x.stride // 8 * 8),
            }  # fmt: skip
            self._emit(
                matmul_kernel(self.compiler, packed.kind), packed.n_groups, StepField.ONE, arguments,
                reads={x.address} | ({residual.address} if residual else set()), writes={out.address},
            )  # fmt: skip
            assert out.stride >= packed.n_groups * ROWS * 4

    def _rope(self, op: ApplyRope) -> None:
        x = self.buffers[op.x]
        out = self.buffers.write_over(op.out, op.x)
        rope: Rope = op.rope
        body = rope_body(op.head_dim, rope.n_dims, rope.pairing)
        arguments: dict[IntEnum, int] = {
            RopeArg.X: x.address, RopeArg.X_STRIDE: x.stride, RopeArg.OUT: out.address, RopeArg.OUT_STRIDE: out.stride,
            RopeArg.TABLE: self.ropes.address(rope), RopeArg.N_HEADS: op.x.width // op.head_dim,
        }  # fmt: skip
        kernel = self.compiler.kernel(f"rope_{op.head_dim}_{rope.n_dims}_{rope.pairing}", body)
        self._emit(kernel, 1, StepField.N_TOKENS, arguments, reads={x.address}, writes={out.address})

    def _kv_group(self, op: StoreKV | Attention) -> int:
        return self.graph.kv_places[op.layer][0]

    def _store_kv(self, op: StoreKV) -> None:
        layer = self.graph.kv_layers[op.layer]
        k, v = self.buffers[op.k], self.buffers[op.v]
        arguments: dict[IntEnum, int] = {
            StoreArg.K: k.address, StoreArg.K_STRIDE: k.stride, StoreArg.V: v.address, StoreArg.V_STRIDE: v.stride,
            StoreArg.K_PAGES: self.pages.key_address(op.layer), StoreArg.V_PAGES: self.pages.value_address(op.layer),
            StoreArg.BLOCK_SIZE: self.config.block_size, StoreArg.N_HEADS: layer.n_kv_heads,
            StoreArg.SLOTS_AT: 4 * self._kv_group(op) * self.config.max_tokens,
        }  # fmt: skip
        k_type, v_type = split_kv_dtype(self.config.kv_dtype)
        body = store_kv_body(layer.head_dim, k_type, v_type)
        kernel = self.compiler.kernel(f"store_kv_{layer.head_dim}_{k_type}_{v_type}", body)
        writes = {self.pages.key_address(op.layer)}
        self._emit(kernel, 1, StepField.N_TOKENS, arguments, reads={k.address, v.address}, writes=writes)

    def _attention(self, op: Attention) -> None:
        layer = self.graph.kv_layers[op.layer]
        group = op.n_heads // layer.n_kv_heads
        q = self.buffers[op.q]
        value = op.out if op.out.dtype == "f32" else Value(f"{op.out.name}.f32", op.out.width)
        out = self.buffers.write(value)
        # with fewer KV heads than threads, the query heads of one KV head are shared out too
        parts = min(group, -(-self.config.n_threads // layer.n_kv_heads))
        arguments: dict[IntEnum, int] = {
            AttentionArg.Q: q.address, AttentionArg.Q_STRIDE: q.stride,
            AttentionArg.OUT: out.address, AttentionArg.OUT_STRIDE: out.stride,
            AttentionArg.K_PAGES: self.pages.key_address(op.layer),
            AttentionArg.V_PAGES: self.pages.value_address(op.layer),
            AttentionArg.BLOCK_SIZE: self.config.block_size, AttentionArg.N_KV_HEADS: layer.n_kv_heads,
            AttentionArg.GROUP: group, AttentionArg.WINDOW: layer.window or _NO_WINDOW,
            AttentionArg.SCALE: float_bits(op.scale), AttentionArg.N_PARTS: parts,
            AttentionArg.PAGE_SHIFT: (self.config.block_size // 16).bit_length() - 1,
            AttentionArg.PARTIALS: self.partials.address, AttentionArg.MAX_PARTITIONS: self.partials.max_partitions,
            AttentionArg.TABLES_AT: 4 * self._kv_group(op) * self.config.max_sequences * self.config.max_blocks,
        }  # fmt: skip
        k_type, v_type = split_kv_dtype(self.config.kv_dtype)
        token_rows = -(-group // parts)
        body = attention_body(layer.head_dim, k_type, v_type, token_rows)
        kernel = self.compiler.kernel(f"attention_{layer.head_dim}_{k_type}_{v_type}_{token_rows}", body)
        reads = {q.address, self.pages.key_address(op.layer)}
        tasks = layer.n_kv_heads * parts
        writes = {out.address, self.partials.address}
        self._emit(kernel, tasks, StepField.N_ATTENTION, arguments, reads=reads, writes=writes)
        merge = self.compiler.kernel(f"attention_merge_{layer.head_dim}", merge_body(layer.head_dim))
        reads = {self.partials.address}
        self._emit(merge, op.n_heads, StepField.N_MERGED, arguments, reads=reads, writes={out.address}, optional=True)
        if value is not op.out:
            self._quantize_into(out, op.out)
            self.buffers.release(out)


def matrices(ops: Sequence[Op]) -> list[Any]:
    """Every matmul's weight in order of use."""
    return [weight for op in ops if isinstance(op, MatMul | ExpertMatMul) for weight in op.weights]
