"""`PreemptionCost`: whether a sequence that gives way comes back sooner by copying its pages or by computing them again.

vLLM's two ways (arXiv:2309.06180, section 4.5), chosen by what both were measured to take on this machine.
"""

from __future__ import annotations

PREEMPTION_MODES = ("auto", "recompute", "swap")
_FORGET = 0.1  # weight of the newest measurement
_MANY_TOKENS = 16  # a step of fewer says little of what a prompt's token takes


class PreemptionCost:
    def __init__(self, mode: str = "auto") -> None:
        self._mode = mode
        self.seconds_per_token: float | None = None  # to compute, in a step of many
        self.seconds_per_page: float | None = None  # to copy, one way

    def note_computed(self, n_tokens: int, seconds: float) -> None:
        """A step ran."""
        if n_tokens >= _MANY_TOKENS:
            self.seconds_per_token = _mean(self.seconds_per_token, seconds / n_tokens)

    def note_copied(self, n_pages: int, seconds: float) -> None:
        """Pages were copied to the host or back."""
        if n_pages:
            self.seconds_per_page = _mean(self.seconds_per_page, seconds / n_pages)

    def prefers_swap(self, n_tokens: int, n_pages: int) -> bool:
        """For a sequence of so many computed tokens in so many pages. What was never measured is tried."""
        if self._mode != "auto":
            return self._mode == "swap"
        if self.seconds_per_token is None or self.seconds_per_page is None:
            return True
        return 2 * n_pages * self.seconds_per_page < n_tokens * self.seconds_per_token


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _FORGET * (new - old)
