"""`LengthPredictor`: how long answers will be, learned from those that ended; no model, only quantiles.

Shortest job first by a predicted length follows SSJF (arXiv:2404.08509), which asks a small model; here requests of one
route whose prompts have about the same length are taken to be alike.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

_WINDOW = 256  # remembered answers of each kind
_ENOUGH = 8  # fewer of a kind say less than more of a wider one

_Kind = tuple[str | None, int | None]


class _Window:
    """The last lengths, also sorted."""

    __slots__ = ("by_age", "by_length")

    def __init__(self) -> None:
        self.by_age: deque[int] = deque()
        self.by_length: list[int] = []

    def add(self, length: int) -> None:
        if len(self.by_age) == _WINDOW:
            oldest = self.by_age.popleft()
            del self.by_length[bisect_right(self.by_length, oldest) - 1]
        self.by_age.append(length)
        insort(self.by_length, length)


class LengthPredictor:
    """Kinds of requests: a route and an octave of prompt lengths, else the route, else all."""

    def __init__(self) -> None:
        self._windows: dict[_Kind, _Window] = {}

    def learn(self, route: str, n_prompt: int, n_output: int) -> None:
        """An answer ended by itself after `n_output` tokens."""
        for kind in _kinds(route, n_prompt):
            self._windows.setdefault(kind, _Window()).add(n_output)

    def remaining(self, route: str, n_prompt: int, n_output: int, most: int, quantile: float = 0.5) -> int:
        """Tokens still to come after `n_output`, 1 to `most`: a quantile of the answers longer than that.

        `most` if nothing is known; half of what there is, if it is longer than all that are known.
        """
        for kind in _kinds(route, n_prompt):
            window = self._windows.get(kind)
            if window is None or len(window.by_length) < _ENOUGH:
                continue
            lengths = window.by_length
            first = bisect_right(lengths, n_output)
            n_longer = len(lengths) - first
            length = lengths[first + int(quantile * n_longer)] if n_longer else n_output + n_output // 2
            return max(1, min(length - n_output, most))
        return most


def _kinds(route: str, n_prompt: int) -> tuple[_Kind, ...]:
    return (route, n_prompt.bit_length()), (route, None), (None, None)
