"""First come, first served."""

from __future__ import annotations

from pyinfer.runtime.request import Sequence


class FirstComeFirstServed:
    """See `policy.Policy`."""

    takes_priority = False

    def rank(self, sequence: Sequence) -> float:
        return 0.0
