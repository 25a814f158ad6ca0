"""Lower `SamplingParams.priority` first, as vLLM has it; without any the same as first come, first served."""

from __future__ import annotations

from pyinfer.runtime.request import Sequence


class Priority:
    """See `policy.Policy`."""

    takes_priority = True

    def rank(self, sequence: Sequence) -> float:
        return sequence.request.params.priority
