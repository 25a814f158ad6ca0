"""`SwapSpace`: the room in host memory for the pages of sequences that gave way."""

from __future__ import annotations

from collections.abc import Iterable

from pyinfer.runtime.page_moves import Move, SwapIn, SwapOut, SwappedPages
from pyinfer.runtime.preemption_cost import PreemptionCost
from pyinfer.runtime.request import Sequence


class SwapSpace:
    """Counts pages; the bytes are with each sequence (`SwappedPages.data`)."""

    def __init__(self, n_pages: int, cost: PreemptionCost) -> None:
        self._n_pages = n_pages
        self._n_used = 0
        self._cost = cost
        self.n_swaps = 0

    def take(self, sequence: Sequence, block_size: int, moves: list[Move]) -> bool:
        """Plan to keep what a sequence has computed, if there is room and that is worth it."""
        n_pages = -(-sequence.n_computed // block_size)
        is_room = 0 < n_pages <= self._n_pages - self._n_used
        if not is_room or not self._cost.prefers_swap(sequence.n_computed, n_pages):
            return False
        sequence.swapped = SwappedPages(sequence.n_computed, n_pages)
        moves.append(SwapOut(sequence, sequence.pages[:n_pages], sequence.swapped))
        self._n_used += n_pages
        self.n_swaps += 1
        return True

    def give(self, sequence: Sequence, n_found: int, moves: list[Move]) -> None:
        """Plan to bring back what the first `n_found` pages, which came from the prefix cache, do not have."""
        swapped = sequence.swapped
        if swapped is not None and swapped.n_computed > sequence.n_computed:
            moves.append(SwapIn(sequence, sequence.pages[n_found : swapped.n_pages], swapped, n_found))
            sequence.n_computed = swapped.n_computed
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        if sequence.swapped is not None:
            self._n_used -= sequence.swapped.n_pages
            sequence.swapped = None

    def check(self, waiting: Iterable[Sequence]) -> None:
        """Assert that exactly what these hold is counted, and that it is there."""
        held = [sequence.swapped for sequence in waiting if sequence.swapped is not None]
        assert sum(swapped.n_pages for swapped in held) == self._n_used <= self._n_pages, "host pages leak"
        assert all(swapped.data is not None and len(swapped.data) == swapped.n_pages for swapped in held)
