"""What happens to pages before a step runs: the scheduler lists the moves in its plan, the engine makes them in order.

The order matters: a page that was freed by one move may be the target of a later one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyinfer.graph.backend import PageData, Stage
from pyinfer.runtime.preemption_cost import PreemptionCost
from pyinfer.runtime.request import Sequence


@dataclass(slots=True, eq=False)
class SwappedPages:
    """What a sequence had computed, in host memory: the pages of each kind's blocks, in order, kind after kind."""

    n_computed: int  # tokens
    firsts: list[int]  # for each kind, its first block
    n_pages: int
    data: PageData | None = None  # None until the move is made


@dataclass(frozen=True, slots=True)
class CopyPage:
    """Copy on write: a sequence is about to write into a page that others hold too."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class SwapOut:
    sequence: Sequence
    pages: list[int]
    swapped: SwappedPages


@dataclass(frozen=True, slots=True)
class SwapIn:
    """What the prefix cache did not have any more: page i comes from row rows[i]."""

    sequence: Sequence
    pages: list[int]
    swapped: SwappedPages
    rows: list[int]


Move = CopyPage | SwapOut | SwapIn


def make_moves(moves: Iterable[Move], stage: Stage, cost: PreemptionCost, clock: Callable[[], float]) -> None:
    for move in moves:
        if isinstance(move, CopyPage):
            stage.copy_page(move.source, move.target)
            continue
        start = clock()
        if isinstance(move, SwapOut):
            move.swapped.data = stage.read_pages(move.pages)
        else:
            assert move.swapped.data is not None
            stage.write_pages(move.pages, move.swapped.data[move.rows])
        cost.note_copied(len(move.pages), clock() - start)


def moved_sequences(moves: Iterable[Move]) -> list[Sequence]:
    """Those whose pages were moved from or to the host."""
    return [move.sequence for move in moves if not isinstance(move, CopyPage)]
