"""The matmul of experts: gathered rows times the weights of their expert, by the tiles of the dense matmul.

Work is measured in pairs x groups of 16 weight rows, of which there are as many as tasks. Task t stands in place t / n_groups,
so in some expert's stretch of tasks, which is shared out over the expert's groups; the piece in which a group's share begins
does the group for all of the expert's rows. In a step each expert's weights are thus read once, and those of no other.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from llvmlite import ir

from pyinfer.kernels_cpu.activation_a8 import TILES
from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.expert_rows import load_int
from pyinfer.kernels_cpu.matmul_block import define_tiles
from pyinfer.kernels_cpu.opcode import OpField
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i64
from pyinfer.kernels_cpu.weight_format import ROWS


class ExpertMatMulArg(IntEnum):
    """Operands of `expert_matmul`; tasks are n_groups for each pair."""

    WEIGHTS = OpField.ARGS
    GROUP_BYTES = OpField.ARGS + 1
    N_RECORDS = OpField.ARGS + 2  # of a row group; for float weights the columns
    N_GROUPS = OpField.ARGS + 3  # of one expert
    X = OpField.ARGS + 4  # gathered rows
    X_ROW_BYTES = OpField.ARGS + 5
    OUT = OpField.ARGS + 6
    OUT_PAIR_BYTES = OpField.ARGS + 7  # of one pair's slot in the output
    ROW_BLOCK = OpField.ARGS + 8  # gathered rows (a multiple of 8) that stay in cache while weight groups pass
    STARTS = OpField.ARGS + 9
    PAIRS_AT = OpField.ARGS + 10
    EXPERTS_AT = OpField.ARGS + 11


def expert_matmul_body(emit_tile: Any, name: str) -> Body:
    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        work = _Work(e, op, define_tiles(e, emit_tile, name))
        n_groups = e.field(op, ExpertMatMulArg.N_GROUPS)
        starts, experts_at = (
            e.ptr(e.field(op, field)) for field in (ExpertMatMulArg.STARTS, ExpertMatMulArg.EXPERTS_AT)
        )
        task = e.var(first)
        with e.repeat_while(lambda: e.lt(e.get(task), last)):
            expert = load_int(e, experts_at, b.sdiv(e.get(task), n_groups))
            start, end = load_int(e, starts, expert), load_int(e, starts, e.add(expert, 1))
            count, stretch = b.sub(end, start), b.mul(start, n_groups)
            stop = e.min(b.mul(end, n_groups), last)
            groups = [
                b.sdiv(b.add(b.sub(t, stretch), e.sub(count, 1)), count) for t in (e.get(task), stop)
            ]  # the first whose share begins at t or later
            first_group = b.mul(expert, n_groups)
            with e.loop(count, 0, e.field(op, ExpertMatMulArg.ROW_BLOCK)) as block:
                block_end = e.min(b.add(block, e.field(op, ExpertMatMulArg.ROW_BLOCK)), count)
                with e.loop(groups[1], groups[0]) as group:
                    work.group(b.add(first_group, group), group, start, block, block_end)
            e.set(task, stop)

    return body


class _Work:
    """One expert's gathered rows times one group of its weights."""

    def __init__(self, e: Emitter, op: Reg, tiles: dict[int, Any]) -> None:
        self.e, self.op, self.tiles = e, op, tiles
        with e.b.goto_entry_block():
            self.results = e.b.alloca(ir.ArrayType(f32, max(TILES) * ROWS))
        self.results.align = 64

    def group(self, weight_group: Reg, group: Reg, start: Reg, block: Reg, end: Reg) -> None:
        """Rows block..end of those that begin at place `start`; `group` counts the expert's own."""
        e, b = self.e, self.e.b
        full = b.add(block, b.and_(b.sub(end, block), e.c(-8)))
        with e.loop(full, block, 8) as m:
            self._tile(8, weight_group, group, b.add(start, m))
        at = full
        rest = b.sub(end, full)
        for rows in TILES[1:]:
            some = b.and_(rest, e.c(rows))
            with e.when(b.icmp_signed("!=", some, e.c(0))):
                self._tile(rows, weight_group, group, b.add(start, at))
            at = b.add(at, some)

    def _tile(self, rows: int, weight_group: Reg, group: Reg, place: Reg) -> None:
        """Rows are computed side by side and then put where their pairs are."""
        e, b, field = self.e, self.e.b, lambda f: self.e.field(self.op, f)
        x_row, results = field(ExpertMatMulArg.X_ROW_BYTES), b.ptrtoint(self.results, i64)
        weights = b.add(field(ExpertMatMulArg.WEIGHTS), b.mul(weight_group, field(ExpertMatMulArg.GROUP_BYTES)))
        x = b.add(field(ExpertMatMulArg.X), b.mul(place, x_row))
        none = e.c(0)
        b.call(
            self.tiles[rows],
            [field(ExpertMatMulArg.N_RECORDS), weights, x, x_row, results, e.c(4 * ROWS), none, none, none],
        )
        pairs_at, out = e.ptr(field(ExpertMatMulArg.PAIRS_AT)), e.ptr(field(ExpertMatMulArg.OUT))
        at_group = e.at(out, e.mul(group, 4 * ROWS))
        for t in range(rows):
            pair = load_int(e, pairs_at, e.add(place, t))
            target = e.at(at_group, b.mul(pair, field(ExpertMatMulArg.OUT_PAIR_BYTES)))
            for v in range(ROWS // e.L):
                value = e.load(e.at(e.ptr(results), 4 * (t * ROWS + v * e.L)), e.vf, 4)
                e.store(value, e.at(target, 4 * e.L * v), 4)
