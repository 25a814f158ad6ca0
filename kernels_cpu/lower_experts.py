"""Lowering of mixtures of experts: route, sort the rows by expert, gather and multiply them, add up what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import CombineExperts, ExpertMatMul, Op, RouteExperts, Value
from pyinfer.kernels_cpu.buffers import Buffer, BufferPlan, stride_of
from pyinfer.kernels_cpu.compiler import Compiler
from pyinfer.kernels_cpu.expert_rows import CombineArg, GatherArg, PlaceArg, combine_body, gather_body, place_body
from pyinfer.kernels_cpu.float_bits import float_bits
from pyinfer.kernels_cpu.matmul_block import ROW_BLOCK_BYTES
from pyinfer.kernels_cpu.matmul_experts import ExpertMatMulArg
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.route_experts import RouteArg, route_body
from pyinfer.kernels_cpu.weight_format import ROWS
from pyinfer.kernels_cpu.weights import WeightArena, expert_matmul_kernel

_COMBINED_COLUMNS = 512  # that are worth a task of their own


@dataclass(frozen=True, slots=True)
class _Places:
    """Where `place` puts the pairs of one step: int32 arrays one behind the other."""

    memory: npt.NDArray[np.int32]
    n_experts: int
    n_pairs: int  # at most

    @classmethod
    def make(cls, n_experts: int, n_pairs: int) -> _Places:
        return cls(allocate(4 * (2 * n_experts + 1 + 2 * n_pairs)).view(np.int32), n_experts, n_pairs)

    @property
    def starts(self) -> int:
        return address(self.memory)

    @property
    def following(self) -> int:
        return self.starts + 4 * (self.n_experts + 1)

    @property
    def pairs_at(self) -> int:
        return self.following + 4 * self.n_experts

    @property
    def experts_at(self) -> int:
        return self.pairs_at + 4 * self.n_pairs


class ExpertRules:
    """One rule an op; `emit` appends a record (see `lower`)."""

    def __init__(
        self, buffers: BufferPlan, max_rows: int, weights: WeightArena, compiler: Compiler, emit: Callable[..., None]
    ) -> None:
        self._buffers, self._max_rows, self._weights = buffers, max_rows, weights
        self._compiler, self._emit = compiler, emit
        self._places: dict[tuple[int, int], _Places] = {}  # of n_experts and n_used: all layers share it
        self._placed: Value | None = None  # whose pairs are sorted there
        self.rules: Mapping[type[Op], Callable[[Any], None]] = {
            RouteExperts: self._route,
            ExpertMatMul: self._matmul,
            CombineExperts: self._combine,
        }

    @property
    def keep(self) -> Any:
        """What the records point to."""
        return self._places

    def _route(self, op: RouteExperts) -> None:
        logits = self._buffers[op.logits]
        experts, weights = self._buffers.write(op.experts), self._buffers.write(op.weights)
        arguments = {
            RouteArg.LOGITS: logits.address, RouteArg.LOGITS_STRIDE: logits.stride,
            RouteArg.N_EXPERTS: op.logits.width, RouteArg.N_USED: op.n_used,
            RouteArg.EXPERTS: experts.address, RouteArg.EXPERTS_STRIDE: experts.stride,
            RouteArg.WEIGHTS: weights.address, RouteArg.WEIGHTS_STRIDE: weights.stride,
            RouteArg.NORMALIZE: int(op.normalize), RouteArg.SCALE: float_bits(op.scale),
        }  # fmt: skip
        kernel = self._compiler.kernel(f"route_{op.scoring}", route_body(op.scoring))
        self._emit(
            kernel, 1, _rows_field(op.logits), arguments,
            reads={logits.address}, writes={experts.address, weights.address},
        )  # fmt: skip

    def _matmul(self, op: ExpertMatMul) -> None:
        n_experts, _, n_in = op.weights[0].shape
        places = self._place(op.experts, n_experts)
        stride = stride_of(Value("pair", n_in, op.x.rows, op.x.dtype))
        # pairs of all rows take the bytes of a value that is n_used times as wide
        gathered = self._buffers.write(Value("gathered", op.n_used * n_in, op.x.rows, op.x.dtype))
        assert gathered.stride == op.n_used * stride
        x, rows = self._buffers[op.x], _rows_field(op.experts)
        arguments = {
            GatherArg.X: x.address, GatherArg.X_STRIDE: x.stride,
            GatherArg.SLOT_BYTES: 0 if op.x.width == n_in else stride,
            GatherArg.OUT: gathered.address, GatherArg.OUT_STRIDE: stride,
            GatherArg.N_USED: op.n_used, GatherArg.ROWS_FIELD: rows, GatherArg.STARTS: places.starts,
            GatherArg.PAIRS_AT: places.pairs_at, GatherArg.EXPERTS_AT: places.experts_at,
        }  # fmt: skip
        form = "a8" if op.x.dtype == "a8" else "floats"
        self._emit(
            self._compiler.kernel(f"gather_{form}", gather_body(form)), op.n_used, rows, arguments,
            reads={x.address, places.starts}, writes={gathered.address},
        )  # fmt: skip
        for i, value in enumerate(op.outs):
            self._product(op, i, gathered, stride, places, self._buffers.write(value))
        self._buffers.release(gathered)

    def _product(
        self, op: ExpertMatMul, index: int, gathered: Buffer, stride: int, places: _Places, out: Buffer
    ) -> None:
        weight = op.weights[index]
        packed, n_groups = self._weights[weight], weight.shape[1] // ROWS
        assert out.stride == 4 * op.n_used * weight.shape[1]
        arguments = {
            ExpertMatMulArg.WEIGHTS: self._weights.address(weight), ExpertMatMulArg.GROUP_BYTES: packed.group_bytes,
            ExpertMatMulArg.N_RECORDS: packed.n_records, ExpertMatMulArg.N_GROUPS: n_groups,
            ExpertMatMulArg.X: gathered.address, ExpertMatMulArg.X_ROW_BYTES: stride,
            ExpertMatMulArg.OUT: out.address, ExpertMatMulArg.OUT_PAIR_BYTES: 4 * weight.shape[1],
            ExpertMatMulArg.ROW_BLOCK: max(8, ROW_BLOCK_BYTES // stride // 8 * 8),
            ExpertMatMulArg.STARTS: places.starts, ExpertMatMulArg.PAIRS_AT: places.pairs_at,
            ExpertMatMulArg.EXPERTS_AT: places.experts_at,
        }  # fmt: skip
        self._emit(
            expert_matmul_kernel(self._compiler, packed.kind), op.n_used * n_groups, _rows_field(op.experts), arguments,
            reads={gathered.address, places.starts}, writes={out.address},
        )  # fmt: skip

    def _place(self, value: Value, n_experts: int) -> _Places:
        """Sort the pairs by expert, unless the products before these did."""
        n_pairs = value.width * self._max_rows
        key = n_experts, n_pairs
        if key not in self._places:
            self._places[key] = _Places.make(*key)
        places = self._places[key]
        if value is self._placed:
            return places
        self._placed = value
        experts = self._buffers[value]
        arguments = {
            PlaceArg.EXPERTS: experts.address, PlaceArg.EXPERTS_STRIDE: experts.stride,
            PlaceArg.N_EXPERTS: n_experts, PlaceArg.N_USED: value.width, PlaceArg.ROWS_FIELD: _rows_field(value),
            PlaceArg.STARTS: places.starts, PlaceArg.NEXT: places.following,
            PlaceArg.PAIRS_AT: places.pairs_at, PlaceArg.EXPERTS_AT: places.experts_at,
        }  # fmt: skip
        kernel = self._compiler.kernel("place", place_body())
        self._emit(kernel, 1, StepField.ONE, arguments, reads={experts.address}, writes={places.starts})
        return places

    def _combine(self, op: CombineExperts) -> None:
        x, weights = self._buffers[op.x], self._buffers[op.weights]
        residual = None if op.residual is None else self._buffers[op.residual]
        out = self._buffers.write(op.out) if op.residual is None else self._buffers.write_over(op.out, op.residual)
        parts = max(1, op.out.width // _COMBINED_COLUMNS)
        arguments = {
            CombineArg.X: x.address, CombineArg.X_STRIDE: x.stride,
            CombineArg.WEIGHTS: weights.address, CombineArg.WEIGHTS_STRIDE: weights.stride,
            CombineArg.RESIDUAL: residual.address if residual else 0,
            CombineArg.RESIDUAL_STRIDE: residual.stride if residual else 0,
            CombineArg.OUT: out.address, CombineArg.OUT_STRIDE: out.stride, CombineArg.WIDTH: op.out.width,
            CombineArg.N_USED: op.weights.width, CombineArg.N_PARTS: parts,
        }  # fmt: skip
        self._emit(
            self._compiler.kernel("combine", combine_body()), parts, _rows_field(op.out), arguments,
            reads={x.address, weights.address} | ({residual.address} if residual else set()), writes={out.address},
        )  # fmt: skip


def _rows_field(value: Value) -> StepField:
    return StepField.N_TOKENS if value.rows == "tokens" else StepField.N_OUTPUTS


def read_by_experts_only(graph: Graph) -> set[int]:
    """Ids of the values that only kernels of this module read, which do with any width, or none, such as logits."""
    read = {
        id(value)
        for op in graph.ops
        for value in op.inputs
        if not isinstance(op, RouteExperts)
        and value not in (getattr(op, "experts", None), getattr(op, "weights", None))
    }
    return {id(value) for op in graph.ops for value in op.outputs} - read
