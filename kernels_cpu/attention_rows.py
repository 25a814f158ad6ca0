"""The attention of a few query rows of one sequence and KV head, emitted for a fixed number of them."""

from __future__ import annotations

from typing import Any

from pyinfer.kernels_cpu.attention_args import MASKED, PARTITION, AttentionArg
from pyinfer.kernels_cpu.kv_format import POSITIONS, KVFormat
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.simd import Emitter, Reg, f32, i16, i32, i64


def merge_sums(e: Emitter, maximum: Reg, total: Reg, new_maximum: Reg, new_total: Reg) -> tuple[Reg, Reg]:
    """Take one more partition into the registers `maximum` and `total`; the factors for the values so far and its own."""
    b = e.b
    before = e.get(maximum)
    after = e.fmax(before, new_maximum)
    keep, take = e.exp(b.fsub(before, after)), e.exp(b.fsub(new_maximum, after))
    e.set(total, e.fma(e.get(total), keep, b.fmul(new_total, take)))
    e.set(maximum, after)
    return keep, take


class AttentionRows:
    """Emits the attention of `n` query rows of one sequence and KV head."""

    def __init__(self, e: Emitter, n: int, head_dim: int, keys: KVFormat, values: KVFormat, args: Any) -> None:
        self.e, self.n, self.head_dim, self.keys, self.values = e, n, head_dim, keys, values
        op, step, scratch, self.sequence, self.token, self.kv_head, self.span, self.first_row = args
        self.op, self.step, self.scratch = e.ptr(op), e.ptr(step), e.ptr(scratch)
        self.q = self.scratch
        self.p = e.at(self.scratch, 4 * 8 * head_dim)
        self.o = e.at(self.p, 4 * 8 * PARTITION)
        self.vectors = 16 // e.L  # of one block of 16 positions

    def emit(self) -> None:
        e, b = self.e, self.e.b
        self._place_rows()
        self._read_queries()
        self.maxima = [e.var(e.floats(MASKED)) for _ in range(self.n)]
        self.sums = [e.var(e.floats(0.0)) for _ in range(self.n)]
        self._start()
        low, high = self.lows[0], self.highs[-1]  # rows ascend in position
        self.last_block = b.ashr(b.sub(high, e.c(1)), e.c(4))
        begin, end = b.sdiv(low, e.c(PARTITION)), b.sdiv(e.add(high, PARTITION - 1), e.c(PARTITION))
        n_spans, count = e.field(self.step, StepField.N_SPANS), b.sub(end, begin)
        many = b.icmp_signed(">", n_spans, e.c(1))
        cut = lambda k: b.add(begin, b.sdiv(b.mul(count, k), n_spans))  # noqa: E731
        with e.loop(cut(e.add(self.span, 1)), cut(self.span)) as partition:
            base = e.mul(partition, PARTITION)
            self.first_block = b.sdiv(e.max(base, low), e.c(16))
            self.end_block = b.sdiv(e.add(e.min(e.add(base, PARTITION), high), 15), e.c(16))
            self.base_block = b.sdiv(base, e.c(16))
            self._partition()
            with e.when(many):
                self._store_partial(partition)
                self._start()
        with e.when(b.not_(many)):
            for r in range(self.n):
                total = e.get(self.sums[r])
                with e.loop(4 * self.head_dim, 0, 4 * e.L) as at:
                    value = e.load(e.at(e.at(self.o, 4 * r * self.head_dim), at), e.vf, 4)
                    e.store(b.fdiv(value, total), e.at(self.outputs[r], at), 4)

    def _start(self) -> None:
        """Nothing seen yet."""
        e = self.e
        with e.loop(4 * self.n * self.head_dim, 0, 4 * e.L) as at:
            e.store(e.floats(0.0), e.at(self.o, at), 4)
        for r in range(self.n):
            e.set(self.maxima[r], e.floats(MASKED))
            e.set(self.sums[r], e.floats(0.0))

    def _store_partial(self, partition: Reg) -> None:
        """Weighted values, maximum and sum of one partition of each row, merged into nothing: as they are."""
        e, b = self.e, self.e.b
        for r in range(self.n):
            record = e.at(self.partials[r], e.mul(partition, 4 * (self.head_dim + 2)))
            with e.loop(4 * self.head_dim, 0, 4 * e.L) as at:
                e.store(e.load(e.at(e.at(self.o, 4 * r * self.head_dim), at), e.vf, 4), e.at(record, at), 4)
            for i, slot in enumerate((self.maxima[r], self.sums[r])):
                e.store(b.extract_element(e.get(slot), i32(0)), e.at(record, 4 * (self.head_dim + i)), 4)

    def _place_rows(self) -> None:
        """Row r of the tile is head kv_head * group + r % group of token r / group."""
        e, b = self.e, self.e.b
        arg = lambda i: e.field(self.op, i)  # noqa: E731
        group, window = arg(AttentionArg.GROUP), arg(AttentionArg.WINDOW)
        positions = e.ptr(e.field(self.step, StepField.POSITIONS))
        n_heads = b.mul(arg(AttentionArg.N_KV_HEADS), group)
        partial_bytes = e.mul(arg(AttentionArg.MAX_PARTITIONS), 4 * (self.head_dim + 2))
        self.queries, self.outputs, self.partials, self.lows, self.highs = [], [], [], [], []
        for r in range(self.n):
            row = e.add(self.first_row, r)
            token = b.add(self.token, b.sdiv(row, group))
            head = b.add(b.mul(self.kv_head, group), b.srem(row, group))
            at_head = e.mul(head, 4 * self.head_dim)
            position = b.sext(e.load(e.at(positions, e.mul(token, 4)), i32, 4), i64)
            self.queries.append(
                e.at(e.at(e.ptr(arg(AttentionArg.Q)), b.mul(token, arg(AttentionArg.Q_STRIDE))), at_head)
            )
            self.outputs.append(
                e.at(e.at(e.ptr(arg(AttentionArg.OUT)), b.mul(token, arg(AttentionArg.OUT_STRIDE))), at_head)
            )
            index = b.add(b.mul(token, n_heads), head)
            self.partials.append(e.at(e.ptr(arg(AttentionArg.PARTIALS)), b.mul(index, partial_bytes)))
            self.highs.append(e.add(position, 1))
            self.lows.append(e.max(b.sub(e.add(position, 1), window), 0))
        blocks = b.ashr(arg(AttentionArg.BLOCK_SIZE), e.c(4))
        self.page_shift = arg(AttentionArg.PAGE_SHIFT)
        self.in_page = b.sub(blocks, e.c(1))  # a mask: blocks of 16 in a page are a power of two
        self.page_blocks = b.mul(blocks, arg(AttentionArg.N_KV_HEADS))
        self.head_blocks = b.mul(self.kv_head, blocks)
        self.k_pages, self.v_pages = e.ptr(arg(AttentionArg.K_PAGES)), e.ptr(arg(AttentionArg.V_PAGES))
        tables = e.at(e.ptr(e.field(self.step, StepField.PAGE_TABLES)), arg(AttentionArg.TABLES_AT))
        self.table = e.at(tables, b.mul(self.sequence, e.field(self.step, StepField.PAGE_TABLE_STRIDE)))

    def _read_queries(self) -> None:
        """Scaled queries as [head_dim][n], so that one address serves all rows."""
        e, b = self.e, self.e.b
        scale = e.splat(e.load(e.at(self.op, 8 * AttentionArg.SCALE), f32, 4))
        with e.loop(self.head_dim, 0, e.L) as d:
            target = e.at(self.q, e.mul(d, 4 * self.n))
            for r in range(self.n):
                value = b.fmul(e.load(e.at(self.queries[r], e.mul(d, 4)), e.vf, 4), scale)
                for j in range(e.L):
                    e.store(b.extract_element(value, i32(j)), e.at(target, 4 * (j * self.n + r)), 4)

    def _block(self, pages: Reg, kind: KVFormat, block: Reg) -> Reg:
        """The address of 16 positions of this head in a K or V pool."""
        e, b = self.e, self.e.b
        page = b.sext(e.load(e.at(self.table, e.mul(b.ashr(block, self.page_shift), 4)), i32, 4), i64)
        index = b.add(b.add(b.mul(page, self.page_blocks), self.head_blocks), b.and_(block, self.in_page))
        return e.at(pages, e.mul(index, kind.block_bytes(self.head_dim)))

    def _ask_for(self, pages: Reg, kind: KVFormat, block: Reg) -> None:
        """Prefetch 16 positions that are needed next: pages jump about, which no hardware prefetcher follows."""
        place = self._block(pages, kind, block)
        for at in range(0, kind.block_bytes(self.head_dim), 64):
            self.e.prefetch(self.e.at(place, at))

    def _p_at(self, r: int, block: Reg) -> Reg:
        e = self.e
        return e.at(e.at(self.p, 4 * r * PARTITION), e.mul(e.b.sub(block, self.base_block), 64))

    def _partition(self) -> None:
        e, b = self.e, self.e.b
        largest = [e.var(e.floats(MASKED)) for _ in range(self.n)]
        with e.loop(self.end_block, self.first_block) as block:
            self._ask_for(self.v_pages, self.values, block)
            self._scores(block, largest)
        weights = []
        for r in range(self.n):
            top = e.splat(e.reduce_max(e.get(largest[r])))
            total = [e.var(e.floats(0.0)) for _ in range(self.vectors)]
            with e.loop(self.end_block, self.first_block) as block:
                for v in range(self.vectors):
                    place = e.at(self._p_at(r, block), 4 * e.L * v)
                    score = e.load(place, e.vf, 4)
                    visible = b.fcmp_ordered(">", score, e.floats(MASKED / 2))
                    p = b.select(visible, e.exp(b.fsub(score, top)), e.floats(0.0))
                    e.store(p, place, 4)
                    e.set(total[v], b.fadd(e.get(total[v]), p))
            sums = e.get(total[0])
            for slot in total[1:]:
                sums = b.fadd(sums, e.get(slot))
            weights.append(merge_sums(e, self.maxima[r], self.sums[r], top, e.splat(e.reduce_add(sums))))
        self._weighted_values(weights)

    def _scores(self, block: Reg, largest: list[Reg]) -> None:
        e, b = self.e, self.e.b
        keys = self._block(self.k_pages, self.keys, block)
        if self.keys.group is None:
            dots = self._dots(keys, 0, self.head_dim)
        else:
            slots = [[e.var(e.floats(0.0)) for _ in range(self.vectors)] for _ in range(self.n)]
            scales = e.at(keys, POSITIONS * self.head_dim)
            with e.loop(self.head_dim // self.keys.group) as g:
                part = self._dots(keys, e.mul(g, self.keys.group), self.keys.group)
                for v in range(self.vectors):
                    scale = e.load_halves(e.at(e.at(scales, e.mul(g, 2 * POSITIONS)), 2 * v * e.L))
                    for r in range(self.n):
                        e.set(slots[r][v], e.fma(part[r][v], scale, e.get(slots[r][v])))
            dots = [[e.get(slot) for slot in row] for row in slots]
        start = b.trunc(e.mul(block, 16), i32)
        for v in range(self.vectors):
            position = b.add(e.splat(b.add(start, i32(v * e.L))), e.lane_index())
            for r in range(self.n):
                low, high = (e.splat(b.trunc(x[r], i32)) for x in (self.lows, self.highs))
                visible = b.and_(b.icmp_signed(">=", position, low), b.icmp_signed("<", position, high))
                score = b.select(visible, dots[r][v], e.floats(MASKED))
                e.store(score, e.at(self._p_at(r, block), 4 * e.L * v), 4)
                e.set(largest[r], e.fmax(e.get(largest[r]), score))

    def _dots(self, keys: Reg, start: Reg | int, n: int) -> list[list[Reg]]:
        """q . codes over `n` columns from `start`, [rows][vectors] of 16 positions; even and odd columns apart, then added."""
        e = self.e
        size = self.keys.element_bytes()
        acc = [[[e.var(e.floats(0.0)) for _ in range(2)] for _ in range(self.vectors)] for _ in range(self.n)]
        with e.loop(e.add(e.c(n), start), start, 2) as d:
            k_at, q_at = e.at(keys, e.mul(d, POSITIONS * size)), e.at(self.q, e.mul(d, 4 * self.n))
            for parity in range(2):
                columns = [
                    self.keys.load(e, e.at(k_at, (parity * POSITIONS + v * e.L) * size)) for v in range(self.vectors)
                ]
                for r in range(self.n):
                    query = e.splat_float(e.at(q_at, 4 * (parity * self.n + r)))
                    for v in range(self.vectors):
                        slot = acc[r][v][parity]
                        e.set(slot, e.fma(query, columns[v], e.get(slot)))
        return [[e.b.fadd(e.get(even), e.get(odd)) for even, odd in row] for row in acc]

    def _weighted_values(self, weights: list[tuple[Reg, Reg]]) -> None:
        """o = o * keep + (p V) * take, a few columns at a time so that the accumulators stay in registers."""
        e, b = self.e, self.e.b
        in_head = self.head_dim // e.L
        budget = max(1, (16 if e.L == 16 else 8) // self.n)
        width = max(w for w in range(1, budget + 1) if in_head % w == 0)
        with e.loop(self.head_dim, 0, width * e.L) as column:
            acc = [[e.var(e.floats(0.0)) for _ in range(width)] for _ in range(self.n)]
            first_pass = b.icmp_signed("==", column, e.c(0))
            with e.loop(self.end_block, self.first_block) as block:
                with e.when(first_pass):
                    self._ask_for(self.k_pages, self.keys, e.min(e.add(block, PARTITION // 16), self.last_block))
                values = self._block(self.v_pages, self.values, block)
                self._add_block(values, column, [self._p_at(r, block) for r in range(self.n)], acc)
            for r, (keep, take) in enumerate(weights):
                for c in range(width):
                    place = e.at(e.at(self.o, 4 * (r * self.head_dim + c * e.L)), e.mul(column, 4))
                    e.store(e.fma(e.load(place, e.vf, 4), keep, b.fmul(e.get(acc[r][c]), take)), place, 4)

    def _add_block(self, values: Reg, column: Reg, probabilities: list[Reg], acc: list[list[Reg]]) -> None:
        """acc += p V over the 16 positions of a block, for the columns from `column` on."""
        e, b = self.e, self.e.b
        size, width, group = self.values.element_bytes(), len(acc[0]), self.values.group
        with e.loop(POSITIONS, 0, 2) as i:
            for k in range(2):
                position = e.add(i, k)
                row = e.at(e.at(values, e.mul(position, self.head_dim * size)), e.mul(column, size))
                loaded = [self.values.load(e, e.at(row, c * e.L * size)) for c in range(width)]
                if group is not None:
                    scales = e.at(
                        e.at(values, POSITIONS * self.head_dim), e.mul(position, 2 * (self.head_dim // group))
                    )
                    for c in range(width):
                        place = e.at(scales, e.mul(b.sdiv(e.add(column, c * e.L), e.c(group)), 2))
                        scale = e.half_to_float(e.splat(e.load(place, i16, 2)))
                        loaded[c] = b.fmul(loaded[c], scale)
                for r, p_row in enumerate(probabilities):
                    p = e.splat_float(e.at(e.at(p_row, e.mul(i, 4)), 4 * k))
                    for c in range(width):
                        e.set(acc[r][c], e.fma(p, loaded[c], e.get(acc[r][c])))
