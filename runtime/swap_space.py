"""`SwapSpace`: the room in host memory for the pages of sequences that gave way."""

from __future__ import annotations

from collections.abc import Iterable

from pyinfer.runtime.page_moves import Move, SwapOut, SwappedPages
from pyinfer.runtime.preemption_cost import PreemptionCost
from pyinfer.runtime.request import Sequence


class SwapSpace:
    """Counts pages; the bytes are with each sequence (`SwappedPages.data`)."""

    def __init__(self, n_pages: int, cost: PreemptionCost) -> None:
        self._n_pages = n_pages
        self._n_used = 0
        self._cost = cost
        self.n_swaps = 0

    def take(self, sequence: Sequence, pages: list[int], moves: list[Move]) -> bool:
        """Plan to keep what a sequence has computed, which is in these pages, if there is room and that is worth it."""
        is_room = 0 < len(pages) <= self._n_pages - self._n_used
        if not is_room or not self._cost.prefers_swap(sequence.n_computed, len(pages)):
            return False
        sequence.swapped = SwappedPages(sequence.n_computed, list(sequence.firsts), len(pages))
        moves.append(SwapOut(sequence, pages, sequence.swapped))
        self._n_used += len(pages)
        self.n_swaps += 1
        return True

    def drop(self, sequence: Sequence) -> None:
        """A sequence has it back, or needs it no more."""
        if sequence.swapped is not None:
            self._n_used -= sequence.swapped.n_pages
            sequence.swapped = None

    def check(self, waiting: Iterable[Sequence]) -> None:
        """Assert that exactly what these hold is counted, and that it is there."""
        held = [sequence.swapped for sequence in waiting if sequence.swapped is not None]
        assert sum(swapped.n_pages for swapped in held) == self._n_used <= self._n_pages, "host pages leak"
        assert all(swapped.data is not None and len(swapped.data) == swapped.n_pages for swapped in held)
