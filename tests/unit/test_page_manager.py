"""Pages of full and sliding layers: what is held, what is given back, what can be reused; random use against contents."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyinfer.graph.kv_groups import KVGroup
from pyinfer.runtime.page_layout import PageLayout
from pyinfer.runtime.page_manager import PageManager
from pyinfer.runtime.page_moves import CopyPage, Move, SwapOut
from pyinfer.runtime.plan import SchedulerConfig
from pyinfer.runtime.preemption_cost import PreemptionCost
from pyinfer.runtime.request import NO_BLOCK, Request, Sequence
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.swap_space import SwapSpace

pytestmark = pytest.mark.unit

GEMMA = (KVGroup((0,)), *(KVGroup((i,), 8) for i in range(1, 3)))


def manager(n_pages: int, groups: tuple[KVGroup, ...] = GEMMA, n_swap: int = 0, **config: Any) -> PageManager:
    settings = {"block_size": 4, "max_tokens": 8, **config}
    return PageManager(SchedulerConfig(**settings), n_pages, groups, SwapSpace(n_swap, PreemptionCost("swap")))


def sequence_of(tokens: list[int], limit: int = 1000) -> Sequence:
    return Sequence(Request("", tokens, SamplingParams(), 0), 0, limit=limit)


def compute(pages: PageManager, sequence: Sequence, n: int, *others: Sequence) -> None:
    """Advance by n tokens, one by one, beside others; what is not known yet is 0."""
    for _ in range(n):
        if sequence.n_computed == len(sequence.tokens):
            sequence.tokens.append(0)
        assert pages.take(sequence, sequence.n_computed + 1, [])
        sequence.n_computed += 1
        pages.remember(sequence)
        pages.check([sequence, *others])


def run(pages: PageManager, tokens: list[int], n: int) -> Sequence:
    sequence = sequence_of(tokens)
    assert pages.admit(sequence, 0, [])
    compute(pages, sequence, n - sequence.n_computed)
    return sequence


@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 64])
@pytest.mark.parametrize("window", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("max_tokens", [1, 7, 64])
def test_the_most_that_is_held_is_what_any_step_needs(block_size: int, window: int, max_tokens: int) -> None:
    """Counted position by position: a step of any length at any place of a sequence of 150."""
    layout = PageLayout((KVGroup((0,), window), KVGroup((1,))), block_size, max_tokens)
    needed = 0
    for start in range(150):
        for count in (1, max_tokens):
            seen = range(max(0, start - window + 1), min(150, start + count))
            needed = max(needed, len({position // block_size for position in seen}))
            assert layout.first_block(1, start) == seen[0] // block_size
    assert [kind.groups for kind in layout.kinds] == [(1,), (0,)], "full attention is the first kind"
    assert layout.most_blocks(1, 150) == needed
    assert layout.most_blocks(0, 150) == -(-150 // block_size)
    n_pages = layout.most_pages(150)
    assert layout.longest(n_pages) >= 150 > layout.longest(n_pages - 1)


def test_sliding_layers_hold_no_more_than_the_window() -> None:
    pages = manager(100)
    sequence = run(pages, list(range(40)), 80)
    full, sliding = sequence.tables
    assert len(full) == len(sliding) == 20 and NO_BLOCK not in full
    # position 79 was the last: it saw 72 to 79, which are in blocks 18 and 19
    assert sliding[:18] == [NO_BLOCK] * 18 and pages.n_held(sequence) == pages.pool.n_held == 20 + 2 * 2
    pages.give_back(sequence)
    pages.check([])
    assert pages.pool.n_held == 0


def test_a_prompt_is_admitted_by_what_it_needs_at_one_time() -> None:
    """100 tokens: 25 full blocks, and 5 sliding ones of two pages for a window of 8 and steps of 8; not 25 of each."""
    sequence = sequence_of(list(range(100)))
    assert not manager(34).admit(sequence, 0, [])
    pages = manager(35)
    assert pages.layout.most_pages(100) == 35
    assert pages.admit(sequence, 0, []) and pages.pool.n_held == 35
    most = 0
    while sequence.n_computed < 100:
        assert pages.take(sequence, min(100, sequence.n_computed + 8), [])
        sequence.n_computed = min(100, sequence.n_computed + 8)
        pages.remember(sequence)
        pages.check([sequence])
        most = max(most, pages.pool.n_held)
    assert most <= 35


def test_a_prefix_is_found_where_full_blocks_are_known_from_the_start_and_sliding_ones_in_the_window() -> None:
    pages = manager(100)
    tokens = list(range(40))
    first = run(pages, tokens, 40)
    pages.give_back(first)
    again = sequence_of([*tokens, 99])
    assert pages.admit(again, 0, []) and again.n_computed == 40
    assert again.tables[1][:8] == [NO_BLOCK] * 8 and NO_BLOCK not in again.tables[1][8:]
    pages.check([again])
    pages.give_back(again)
    # a shorter prefix: its window is there as long as nobody needed its place
    shorter = sequence_of([*tokens[:20], 99])
    assert pages.admit(shorter, 0, []) and shorter.n_computed == 20 and shorter.tables[1][:3] == [NO_BLOCK] * 3
    pages.give_back(shorter)
    pages.check([])


def test_a_prefix_without_its_window_is_not_found() -> None:
    """The pool is so small that the blocks behind the window were taken again."""
    pages = manager(35)
    tokens = list(range(100))
    first = run(pages, tokens[:60], 60)
    pages.give_back(first)
    known, digests = pages.pool.known(1), first.page_digests(15, 4)
    n_known = [digest in known for digest in digests].count(True)
    assert n_known < 15 and all(digest in pages.pool.known(0) for digest in digests)
    end = next(n for n in range(14, 0, -1) if not all(digest in known for digest in digests[max(0, n - 2) : n]))
    other = sequence_of(tokens[: 4 * end + 1])
    assert pages.admit(other, 0, []) and other.n_computed < 4 * end
    pages.check([other])


def test_two_windows_agree_on_a_prefix() -> None:
    """The longest prefix of one window may not be one of the other: the next shorter one is tried."""
    groups = (KVGroup((0,)), KVGroup((1,), 4), KVGroup((2,), 12))
    pages = manager(100, groups)
    digests = run(pages, list(range(40)), 40).page_digests(10, 4)
    for kind, missing in ((1, {9}), (2, {6, 2})):
        for i in missing:
            pages.pool.known(kind).pop(digests[i])
    # kind 1 knows the end of 9 blocks and of less, kind 2 that of 10, and of 6 and less without block 2
    assert pages._longest_hit(digests) == 6
    pages.pool.known(1).pop(digests[5])  # so not the end of 6 blocks, and kind 2 not that of 5 or less to 3
    assert pages._longest_hit(digests) == 2


def test_a_block_that_two_share_is_given_back_by_the_last() -> None:
    pages = manager(60)
    parent = run(pages, list(range(22)), 22)
    child = sequence_of(list(range(22)))
    pages.fork(parent, child)
    pages.check([parent, child])
    moves: list[Move] = []
    child.tokens.append(5)
    assert pages.take(child, 23, moves) and len(moves) == 3, "a page of each group"
    child.n_computed += 1
    pages.check([parent, child])
    compute(pages, child, 20, parent)
    assert parent.tables[1][3:] != child.tables[1][3:6] and pages.pool.references[parent.tables[1][3]] == 1
    pages.check([parent, child])


# ---- random use

FAMILIES = [[10 * family + i % 7 for i in range(90)] for family in range(2)]
KINDS = st.sampled_from(
    [
        (KVGroup((0,)),),
        GEMMA,
        (KVGroup((0,), 9),),
        (KVGroup((0,)), KVGroup((1,), 5), KVGroup((2,), 17), KVGroup((3,), 5)),
        (KVGroup((0,), 6), KVGroup((1,), 13)),
        (KVGroup((0,), 6), KVGroup((1,))),
    ]
)


class PagesUnderUse(RuleBasedStateMachine):
    """Sequences come, advance, fork, give way and end; a dictionary has what each page holds."""

    @initialize(
        groups=KINDS,
        block_size=st.sampled_from([1, 2, 4, 7, 16, 64]),
        max_tokens=st.integers(1, 20),
        room=st.integers(100, 300),
        n_swap=st.sampled_from([0, 30, 1000]),
        prefix_caching=st.sampled_from([True, True, False]),
    )
    def start(
        self,
        groups: tuple[KVGroup, ...],
        block_size: int,
        max_tokens: int,
        room: int,
        n_swap: int,
        prefix_caching: bool,
    ) -> None:
        layout = PageLayout(groups, block_size, max_tokens)
        self.groups = groups
        self.pages = manager(
            layout.most_pages(100) * room // 100,
            groups,
            n_swap,
            block_size=block_size,
            max_tokens=max_tokens,
            prefix_caching=prefix_caching,
        )
        self.content: dict[tuple[int, int], tuple[int, int]] = {}  # page, offset -> group, digest of the tokens so far
        self.host: dict[int, list[dict[int, tuple[int, int]]]] = {}
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []

    def make(self, moves: list[Move]) -> None:
        for move in moves:
            if isinstance(move, CopyPage):
                self.write_page(move.target, self.read_page(move.source))
            elif isinstance(move, SwapOut):
                self.host[id(move.swapped)] = [self.read_page(page) for page in move.pages]
                move.swapped.data = [()] * len(move.pages)  # type: ignore[assignment]
            else:
                for page, row in zip(move.pages, move.rows, strict=True):
                    self.write_page(page, self.host[id(move.swapped)][row])

    def read_page(self, page: int) -> dict[int, tuple[int, int]]:
        return {offset: what for (other, offset), what in self.content.items() if other == page}

    def write_page(self, page: int, content: dict[int, tuple[int, int]]) -> None:
        for offset in range(self.pages.layout.block_size):
            self.content.pop((page, offset), None)
        self.content.update({(page, offset): what for offset, what in content.items()})

    def place(self, sequence: Sequence, position: int) -> list[tuple[int, int, int]]:
        """(group, page, offset) for each group."""
        block, offset = divmod(position, self.pages.layout.block_size)
        places = []
        for kind, table in zip(self.pages.layout.kinds, sequence.tables, strict=True):
            pages = self.pages.pool.pages_of(table[block]) if table[block] != NO_BLOCK else [-1] * len(kind.groups)
            places += [(group, page, offset) for group, page in zip(kind.groups, pages, strict=True)]
        return sorted(places)

    @rule(family=st.sampled_from(FAMILIES), n=st.sampled_from([60, 41, 90, 17, 1]), own=st.integers(0, 5))
    def come(self, family: list[int], n: int, own: int) -> None:
        if len(self.running) + len(self.waiting) < 5:
            self.waiting.append(sequence_of([*family[:n], *range(100, 100 + own)], limit=100))
            self.admit(self.waiting[-1])

    def admit(self, sequence: Sequence) -> None:
        moves: list[Move] = []
        if self.pages.admit(sequence, len(self.running), moves):
            self.make(moves)
            self.waiting.remove(sequence)
            self.running.append(sequence)
        else:
            assert self.running, "a sequence that is alone always has room"

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        self.admit(data.draw(st.sampled_from(self.waiting)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 20), n=st.sampled_from([90, 30, 9, 1]))
    def advance(self, data: st.DataObject, count: int, n: int) -> None:
        """By n tokens, at most `count` at a time."""
        self.compute(data.draw(st.sampled_from(self.running)), count, n)

    def compute(self, sequence: Sequence, count: int, n: int) -> None:
        count = min(count, self.pages.layout.max_tokens)
        for _ in range(-(-n // count)):
            if sequence.n_computed == len(sequence.tokens):
                if len(sequence.tokens) == sequence.limit:
                    return
                sequence.tokens.append(len(self.content) % 4)
            start = sequence.n_computed
            end = min(len(sequence.tokens), start + count)
            moves: list[Move] = []
            is_taken = self.pages.take(sequence, end, moves)
            self.make(moves)
            if not is_taken:
                assert len(self.running) > 1, "a sequence that is alone can go on"
                return
            self.look(sequence)
            for position in range(start, end):
                for group, page, offset in self.place(sequence, position):
                    self.content[page, offset] = group, hash(tuple(sequence.tokens[: position + 1]))
            sequence.n_computed = end
            if self.pages._config.prefix_caching:
                self.pages.remember(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), n=st.integers(1, 20))
    def fork(self, data: st.DataObject, n: int) -> None:
        parent = data.draw(st.sampled_from(self.running))
        self.compute(parent, 20, len(parent.tokens) - parent.n_computed)
        if len(self.running) < 6 and parent.n_computed == len(parent.tokens) < 100:
            child = sequence_of(list(parent.tokens), limit=100)
            self.pages.fork(parent, child)
            self.running.append(child)
            for sequence in (child, parent):
                self.compute(sequence, 1, n)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def give_way(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        moves: list[Move] = []
        self.pages.keep_in_host(sequence, moves)
        self.make(moves)
        self.pages.give_back(sequence)
        self.running.remove(sequence)
        self.waiting.append(sequence)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running + self.waiting))
        if sequence in self.running:
            self.running.remove(sequence)
            self.pages.give_back(sequence)
        else:
            self.waiting.remove(sequence)
            self.pages.swap.drop(sequence)

    @invariant()
    def books_balance_and_everything_in_sight_is_there(self) -> None:
        if not hasattr(self, "running"):
            return
        self.pages.check(self.running)
        self.pages.swap.check(self.waiting)
        for sequence in self.running:
            self.look(sequence)

    def look(self, sequence: Sequence) -> None:
        """All that the next token sees must be there."""
        for position in range(sequence.n_computed):
            for group, page, offset in self.place(sequence, position):
                window = self.groups[group].window
                if window is None or position > sequence.n_computed - window:
                    expected = group, hash(tuple(sequence.tokens[: position + 1]))
                    assert self.content[page, offset] == expected


TestPagesUnderUse = PagesUnderUse.TestCase
TestPagesUnderUse.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
