"""`StepWatch`: how long an engine may be silent while it has work before it counts as hung."""

from __future__ import annotations

_FACTOR = 20.0  # a step may take so many times what it should
_FIRST = 600.0  # seconds for the first step, of which nothing is known yet


class StepWatch:
    """Learns from the steps it sees; never less than `floor` seconds, since a machine can be busy with other things."""

    def __init__(self, max_tokens: int, *, floor: float = 30.0, first: float = _FIRST) -> None:
        self._max_tokens = max_tokens
        self._floor = floor
        self._first = first
        self._longest = 0.0  # seconds
        self._widest = 0  # tokens of the largest step
        self._full = 0.0  # seconds of a step of `max_tokens`, judged by the widest

    def note(self, seconds: float, n_tokens: int) -> None:
        if n_tokens <= 0:
            return
        self._longest = max(self._longest, seconds)
        if n_tokens >= self._widest:
            full = seconds * self._max_tokens / n_tokens
            self._full = max(self._full, full) if n_tokens == self._widest else full
            self._widest = n_tokens

    @property
    def limit(self) -> float:
        """Seconds."""
        if not self._widest:
            return max(self._first, self._floor)
        return max(self._floor, _FACTOR * max(self._longest, self._full))
