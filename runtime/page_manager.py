"""`PageManager`: which pages each sequence holds, in a table for each kind of layer.

As vLLM's hybrid KV cache manager: full attention holds a sequence's blocks from the first to the last; a sliding window
only those that the next token still sees. What it has passed goes back to the pool at once, and stays findable there
while its place is not needed. A prefix can be reused up to where its full blocks are known from the start and its
sliding ones inside the window.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from pyinfer.graph.kv_groups import KVGroup
from pyinfer.runtime.page_layout import PageLayout
from pyinfer.runtime.page_moves import CopyPage, Move, SwapIn
from pyinfer.runtime.pages import PagePool
from pyinfer.runtime.plan import SchedulerConfig
from pyinfer.runtime.request import NO_BLOCK, Sequence
from pyinfer.runtime.swap_space import SwapSpace

ONE_GROUP = (KVGroup(()),)


class PageManager:
    """Owns the pool, and of each sequence `tables`, `firsts`, `n_writable` and `n_remembered`."""

    def __init__(self, config: SchedulerConfig, n_pages: int, groups: Iterable[KVGroup], swap: SwapSpace) -> None:
        self.layout = PageLayout(groups, config.block_size, config.max_tokens)
        self.pool = PagePool(n_pages, self.layout.spans)
        self.swap = swap
        self.n_prefix_queries = 0  # tokens looked up
        self.n_prefix_hits = 0  # of those, found
        self._config = config
        self._block_size = config.block_size

    # ---- beginning

    def admit(self, sequence: Sequence, n_running: int, moves: list[Move]) -> bool:
        """Give a waiting sequence the blocks of all its tokens, shared where the prefix is known; False if they lack.

        Of sliding kinds it gets as many as it ever needs at one time; later ones come as it gives back what is behind.
        """
        assert not sequence.n_coming
        n_tokens, block_size, layout, pool = len(sequence.tokens), self._block_size, self.layout, self.pool
        reads_cache = self._config.prefix_caching and sequence.reads_cache
        # at least one token is left to compute, for its logits
        digests = sequence.page_digests((n_tokens - 1) // block_size, block_size) if reads_cache else []
        n_found = self._longest_hit(digests)
        n_computed, swapped = n_found * block_size, sequence.swapped
        if swapped is not None and swapped.n_computed > n_computed:
            n_computed = swapped.n_computed
        # room for each running sequence to grow by a block, so that it does not at once throw out the new one
        needed = min(n_running * layout.n_groups, pool.n_pages // 8)
        tables, firsts, counts = [], [], []
        for kind, span in enumerate(layout.spans):
            first, known = layout.first_block(kind, n_computed), pool.known(kind)
            table = [NO_BLOCK] * first + [known[digest] for digest in digests[first:n_found]]
            end = min(-(-n_tokens // block_size), first + layout.most_blocks(kind, n_tokens))
            counts.append(end - len(table))
            needed += span * counts[-1] + pool.n_kept_among(table[first:], kind)
            tables.append(table)
            firsts.append(first)
        if needed > pool.n_available:
            return False
        for table, first in zip(tables, firsts, strict=True):
            for block in table[first:]:
                pool.share(block)
        for kind, (table, count) in enumerate(zip(tables, counts, strict=True)):
            table += [pool.allocate(kind) for _ in range(count)]
        sequence.tables, sequence.firsts = tables, firsts
        sequence.n_computed, sequence.n_remembered = n_computed, n_found
        self._note_writable(sequence)
        if swapped is not None and n_computed > n_found * block_size:
            self._swap_in(sequence, n_found, moves)
        self.swap.drop(sequence)
        if reads_cache:
            self.n_prefix_queries += n_tokens
            self.n_prefix_hits += n_found * block_size
        return True

    def _longest_hit(self, digests: Seq[bytes]) -> int:
        """Blocks of the longest prefix of which each kind still has what the next token sees."""
        n, block_size, layout = len(digests), self._block_size, self.layout
        if 0 not in layout.sliding:  # full attention is the first kind
            known = self.pool.known(0)
            n = next((i for i, digest in enumerate(digests) if digest not in known), n)
        is_settled = not layout.sliding
        while not is_settled:
            before = n
            for kind in layout.sliding:
                known, i = self.pool.known(kind), n
                while i > layout.first_block(kind, n * block_size):  # blocks i .. n-1 are known
                    i -= 1
                    if digests[i] not in known:
                        n = i
            is_settled = n == before or len(layout.sliding) == 1
        return n

    def _swap_in(self, sequence: Sequence, n_found: int, moves: list[Move]) -> None:
        """Bring back the blocks that the prefix cache did not have."""
        swapped, pool = sequence.swapped, self.pool
        assert swapped is not None
        end = -(-swapped.n_computed // self._block_size)
        pages: list[int] = []
        rows: list[int] = []
        row = 0
        for table, first, span in zip(sequence.tables, swapped.firsts, self.layout.spans, strict=True):
            for block in range(first, end):
                if block >= n_found:
                    pages += pool.pages_of(table[block])
                    rows += range(row, row + span)
                row += span
        moves.append(SwapIn(sequence, pages, swapped, rows))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a child whose tokens are the parent's hold its blocks; the last may be written to by both."""
        end = -(-parent.n_computed // self._block_size)  # none that were taken ahead
        child.tables = [table[:end] for table in parent.tables]
        child.firsts = list(parent.firsts)
        for table, first in zip(child.tables, child.firsts, strict=True):
            for block in table[first:]:
                self.pool.share(block)
        child.n_computed, child.n_remembered = parent.n_computed, parent.n_remembered
        child.digests = list(parent.digests)
        child.n_writable = parent.n_writable = parent.n_computed

    # ---- running

    def take(self, sequence: Sequence, end: int, moves: list[Move]) -> bool:
        """Blocks of its own for its tokens up to `end`: new ones, and copies of what others hold too.

        First gives back what is behind the windows. False, with nothing else done, if the pool has too few pages.
        """
        pool, layout, tables, block_size = self.pool, self.layout, sequence.tables, self._block_size
        if layout.sliding:
            self._give_back_behind(sequence)
        index, n_blocks = sequence.n_computed // block_size, -(-end // block_size)
        if index * block_size == sequence.n_computed and n_blocks == index + 1 and pool.n_available >= layout.n_groups:
            # what decoding needs: the next block, of all kinds that have not taken it ahead; nothing to write is shared
            for kind, table in enumerate(tables):
                if len(table) == index:
                    table.append(pool.allocate(kind))
            sequence.n_writable = n_blocks * block_size
            return True
        needed, shared = 0, False
        for table, span in zip(tables, layout.spans, strict=True):
            if index < len(table) and pool.references[table[index]] > 1:
                shared = True
                needed += span
            if n_blocks > len(table):
                needed += span * (n_blocks - len(table))
        if needed > pool.n_available:
            return False
        if shared:
            self._copy_block(sequence, index, moves)
            tables = sequence.tables
        for kind, table in enumerate(tables):
            while len(table) < n_blocks:
                table.append(pool.allocate(kind))
        self._note_writable(sequence)
        return True

    def _copy_block(self, sequence: Sequence, index: int, moves: list[Move]) -> None:
        """Copy on write, in all kinds, as what forked shares in all."""
        pool = self.pool
        # new lists: the sequence's rows in the page tables are written again
        sequence.tables = [list(table) for table in sequence.tables]
        for kind, table in enumerate(sequence.tables):
            old, new = table[index], pool.allocate(kind)
            moves += [CopyPage(*pages) for pages in zip(pool.pages_of(old), pool.pages_of(new), strict=True)]
            pool.release([old], kind)
            table[index] = new

    def _give_back_behind(self, sequence: Sequence) -> None:
        for kind in self.layout.sliding:
            first, end = sequence.firsts[kind], self.layout.first_block(kind, sequence.n_computed)
            if end > first:
                table = sequence.tables[kind]
                self.pool.release(table[first:end], kind)
                table[first:end] = [NO_BLOCK] * (end - first)
                sequence.firsts[kind] = end

    def _note_writable(self, sequence: Sequence) -> None:
        sequence.n_writable = min(map(len, sequence.tables)) * self._block_size

    def remember(self, sequence: Sequence) -> int:
        """Make what is full by now findable; returns the number of computed tokens at which there will be more."""
        block_size = self._block_size
        n_full = (sequence.n_computed - sequence.n_flying) // block_size
        if n_full > sequence.n_remembered:
            sequence.extend_digests(n_full, block_size)
            remember = self.pool.remember
            for i in range(sequence.n_remembered, n_full):
                digest = sequence.digests[i + 1]
                for kind, table in enumerate(sequence.tables):
                    if table[i] != NO_BLOCK:
                        remember(table[i], digest, kind)
            sequence.n_remembered = n_full
        return (n_full + 1) * block_size

    # ---- ending

    def keep_in_host(self, sequence: Sequence, moves: list[Move]) -> bool:
        """Plan to copy what a sequence has computed to host memory, before `give_back`; False if that is not to be."""
        self._give_back_behind(sequence)
        end = -(-sequence.n_computed // self._block_size)
        pages = [
            page
            for table, first in zip(sequence.tables, sequence.firsts, strict=True)
            for block in table[first:end]
            for page in self.pool.pages_of(block)
        ]
        return self.swap.take(sequence, pages, moves)

    def give_back(self, sequence: Sequence) -> None:
        for kind, (table, first) in enumerate(zip(sequence.tables, sequence.firsts, strict=True)):
            self.pool.release(reversed(table[first:]), kind)
        sequence.tables, sequence.firsts = [], []
        sequence.n_computed = sequence.n_remembered = sequence.n_writable = sequence.n_flying = 0

    # ---- books

    def n_held(self, sequence: Sequence) -> int:
        """Pages, in all groups, that others may hold too."""
        return sum(
            span * (len(table) - first)
            for span, table, first in zip(self.layout.spans, sequence.tables, sequence.firsts, strict=True)
        )

    def check(self, running: Iterable[Sequence]) -> None:
        """Assert that these hold what they need, no more, and all that the pool has given."""
        held: list[tuple[int, int]] = []
        for sequence in running:
            self._check_tables(sequence)
            for kind, (table, first) in enumerate(zip(sequence.tables, sequence.firsts, strict=True)):
                held += [(kind, block) for block in table[first:]]
        self.pool.check(held)

    def _check_tables(self, sequence: Sequence) -> None:
        layout, block_size, n_computed = self.layout, self._block_size, sequence.n_computed
        assert sequence.n_remembered * block_size <= n_computed
        assert len(sequence.tables) == len(sequence.firsts) == len(layout.kinds)
        for kind, (table, first) in enumerate(zip(sequence.tables, sequence.firsts, strict=True)):
            assert n_computed <= len(table) * block_size and sequence.n_writable <= len(table) * block_size
            assert first <= layout.first_block(kind, n_computed), "a block inside the window was given back"
            assert all(block == NO_BLOCK for block in table[:first]) and NO_BLOCK not in table[first:]
            assert len(set(table[first:])) == len(table) - first, "a sequence holds a block twice"
            ahead = -(-self._config.multi_step // block_size)
            assert len(table) - first <= layout.most_blocks(kind, sequence.limit) + ahead, "more than a window is held"
            if sequence.n_writable > n_computed:
                own = table[n_computed // block_size :]
                assert all(self.pool.references[block] == 1 for block in own), "a block to write is shared"
