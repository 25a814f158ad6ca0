"""`PageLayout`: how many pages a sequence needs, and which of them a window has passed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from pyinfer.graph.kv_groups import KVGroup


@dataclass(frozen=True, slots=True)
class PageKind:
    """KV groups of one window. They take and give back together what they hold of a block: a page for each group."""

    groups: tuple[int, ...]  # rows of the batch's slots and page tables
    window: int | None  # in tokens; None: a block is held to the end


class PageLayout:
    """The kinds of a model and their blocks of `block_size` positions; a step advances a sequence by `max_tokens`."""

    def __init__(self, groups: Iterable[KVGroup], block_size: int, max_tokens: int) -> None:
        by_window: dict[int | None, list[int]] = {}
        for index, group in enumerate(groups):
            by_window.setdefault(group.window, []).append(index)
        full_first = sorted(by_window.items(), key=lambda item: item[0] is not None)
        self.kinds = tuple(PageKind(tuple(indices), window) for window, indices in full_first)
        self.spans = tuple(len(kind.groups) for kind in self.kinds)
        self.sliding = tuple(k for k, kind in enumerate(self.kinds) if kind.window is not None)
        self.block_size = block_size
        self.max_tokens = max_tokens

    @property
    def n_groups(self) -> int:
        return sum(self.spans)

    def first_block(self, kind: int, n_computed: int) -> int:
        """The first block that anything at position `n_computed` or later still attends to."""
        window = self.kinds[kind].window
        return 0 if window is None else max(0, n_computed + 1 - window) // self.block_size

    def most_blocks(self, kind: int, n_tokens: int) -> int:
        """Blocks that a sequence of `n_tokens` holds at most at one time: no more than a window and a step span."""
        n_blocks, window = -(-n_tokens // self.block_size), self.kinds[kind].window
        if window is None:
            return n_blocks
        return min(n_blocks, (window + self.max_tokens - 3 + self.block_size) // self.block_size + 1)

    def most_pages(self, n_tokens: int) -> int:
        """Pages of all groups that a sequence of `n_tokens` holds at most at one time."""
        return sum(span * self.most_blocks(kind, n_tokens) for kind, span in enumerate(self.spans))

    def longest(self, n_pages: int) -> int:
        """Tokens of the longest sequence that so many pages hold, up to 2^31."""
        most = (1 << 31) // self.block_size
        n_blocks = bisect_right(range(most), n_pages, key=lambda n: self.most_pages(n * self.block_size)) - 1
        return n_blocks * self.block_size
