"""Writing keys and values into their pages.

A page of one layer holds, for each KV head, K as [block/16][head_dim][16 positions] (scores need no horizontal sums) and V as
[block][head_dim], in float16 or float32.
"""

from __future__ import annotations

from enum import IntEnum

from pyinfer.kernels_cpu.compiler import Body
from pyinfer.kernels_cpu.opcode import OpField, StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, i32, i64

KV_BYTES = {"f16": 2, "f32": 4}
F16_MAX = 65504.0


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


def store_kv_body(head_dim: int, dtype: str) -> Body:
    size = KV_BYTES[dtype]

    def convert(e: Emitter, pointer: Reg) -> Reg:
        value = e.load(pointer, e.vf, 4)
        if dtype == "f32":
            return value
        # an infinity in a stale page would turn a masked 0 * V into NaN for another request
        value = e.fmin(e.fmax(value, e.floats(-F16_MAX)), e.floats(F16_MAX))
        return e.float_to_half(value)

    def body(e: Emitter, op: Reg, step: Reg, first: Reg, last: Reg, scratch: Reg) -> None:
        b = e.b
        slots = e.ptr(e.field(step, StepField.SLOTS))
        block_size, n_heads = e.field(op, StoreArg.BLOCK_SIZE), e.field(op, StoreArg.N_HEADS)
        head_bytes = e.mul(block_size, head_dim * size)
        with e.loop(last, first) as m:
            slot = b.sext(e.load(e.at(slots, e.mul(m, 4)), i32, 4), i64)
            page, offset = b.sdiv(slot, block_size), b.srem(slot, block_size)
            at_page = b.mul(page, b.mul(head_bytes, n_heads))
            k_row = e.at(e.ptr(e.field(op, StoreArg.K)), e.mul(m, e.field(op, StoreArg.K_STRIDE)))
            v_row = e.at(e.ptr(e.field(op, StoreArg.V)), e.mul(m, e.field(op, StoreArg.V_STRIDE)))
            in_block = b.add(e.mul(b.ashr(offset, e.c(4)), head_dim * 16 * size), e.mul(b.and_(offset, e.c(15)), size))
            k_page = e.at(e.at(e.ptr(e.field(op, StoreArg.K_PAGES)), at_page), in_block)
            v_page = e.at(e.at(e.ptr(e.field(op, StoreArg.V_PAGES)), at_page), e.mul(offset, head_dim * size))
            with e.loop(n_heads) as head:
                at_head, from_head = b.mul(head, head_bytes), e.mul(head, head_dim * 4)
                k_head, v_head = e.at(k_page, at_head), e.at(v_page, at_head)
                for d in range(0, head_dim, e.L):
                    e.store(convert(e, e.at(e.at(v_row, from_head), 4 * d)), e.at(v_head, d * size), size)
                    column = convert(e, e.at(e.at(k_row, from_head), 4 * d))
                    for j in range(e.L):
                        e.store(b.extract_element(column, i32(j)), e.at(k_head, (d + j) * 16 * size), size)

    return body
