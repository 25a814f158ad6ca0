"""Memory of results that stages share: which of it is needed where the next stage begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

M = TypeVar("M")


class HeldResults(Generic[M]):
    """Of stages that run in the order of their numbers; see `graph.backend.PartsBackend` for `last_reader`."""

    def __init__(self) -> None:
        self._held: list[tuple[int, M]] = []

    def hold(self, last_reader: int, memory: Iterable[M]) -> None:
        self._held += [(last_reader, each) for each in memory]

    def release_before(self, number: int) -> list[M]:
        """What the stage of this number and those after it may write over, each told once."""
        free = [memory for last_reader, memory in self._held if last_reader < number]
        self._held = [held for held in self._held if held[0] >= number]
        return free
