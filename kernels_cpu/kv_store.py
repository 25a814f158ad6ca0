"""Writing a step's keys and values into their pages.

A page of one layer holds, for each KV head, its blocks of 16 positions in the layout of `kv_format`.
"""

from __future__ import annotations

from enum import IntEnum

from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.kv_format import kv_format
from pyinfer.kernels_cpu.opcode import OpField, StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, i32, i64


class StoreArg(IntEnum):
    """Operands of `store_kv`; a task is a token."""

    K = OpField.ARGS
    K_STRIDE = OpField.ARGS + 1
    V = OpField.ARGS + 2
    V_STRIDE = OpField.ARGS + 3
    K_PAGES = OpField.ARGS + 4
    V_PAGES = OpField.ARGS + 5
    BLOCK_SIZE = OpField.ARGS + 6
    N_HEADS = OpField.ARGS + 7
    SLOTS_AT = OpField.ARGS + 8  # bytes from the step's slots to those of the layer's group


def store_kv_body(head_dim: int, k_dtype: str, v_dtype: str) -> Body:
    keys, values = kv_format(k_dtype, head_dim), kv_format(v_dtype, head_dim)

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        slots = e.at(e.ptr(e.field(step, StepField.SLOTS)), e.field(op, StoreArg.SLOTS_AT))
        block_size, n_heads = e.field(op, StoreArg.BLOCK_SIZE), e.field(op, StoreArg.N_HEADS)
        blocks = b.ashr(block_size, e.c(4))  # of 16 positions, in a page
        with e.loop(last, first) as m:
            slot = b.sext(e.load(e.at(slots, e.mul(m, 4)), i32, 4), i64)
            page, offset = b.sdiv(slot, block_size), b.srem(slot, block_size)
            block, position = b.ashr(offset, e.c(4)), b.and_(offset, e.c(15))
            k_row = e.at(e.ptr(e.field(op, StoreArg.K)), e.mul(m, e.field(op, StoreArg.K_STRIDE)))
            v_row = e.at(e.ptr(e.field(op, StoreArg.V)), e.mul(m, e.field(op, StoreArg.V_STRIDE)))
            k_pages, v_pages = (e.ptr(e.field(op, i)) for i in (StoreArg.K_PAGES, StoreArg.V_PAGES))
            with e.loop(n_heads) as head:
                index = b.add(b.mul(b.add(b.mul(page, n_heads), head), blocks), block)
                at_head = e.mul(head, head_dim * 4)
                k_block = e.at(k_pages, e.mul(index, keys.block_bytes(head_dim)))
                v_block = e.at(v_pages, e.mul(index, values.block_bytes(head_dim)))
                keys.store_key(e, e.at(k_row, at_head), k_block, position, head_dim)
                values.store_value(e, e.at(v_row, at_head), v_block, position, head_dim)

    return body
