"""What happens to pages before a step runs: the scheduler lists the moves in its plan, the engine makes them in order.

The order matters: a page that was freed by one move may be the target of a later one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyinfer.graph.backend import Stage


@dataclass(frozen=True, slots=True)
class CopyPage:
    """Copy on write: a sequence is about to write into a page that others hold too."""

    source: int
    target: int


Move = CopyPage


def make_moves(moves: Iterable[Move], stage: Stage) -> None:
    for move in moves:
        stage.copy_page(move.source, move.target)
