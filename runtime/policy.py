"""`Policy`: in which order requests are served. Aging, which bounds how long any of them waits, is the scheduler's."""

from __future__ import annotations

from typing import Protocol

from pyinfer.errors import ConfigError
from pyinfer.runtime.length_predictor import LengthPredictor
from pyinfer.runtime.policy_fcfs import FirstComeFirstServed
from pyinfer.runtime.policy_priority import Priority
from pyinfer.runtime.policy_ssjf import ShortestJobFirst
from pyinfer.runtime.request import Sequence

POLICIES = ("fcfs", "priority", "ssjf")


class Policy(Protocol):
    """Those served last are also the first to give way when pages run out."""

    takes_priority: bool  # requests may have one; else it is an error and not dropped in silence

    def rank(self, sequence: Sequence) -> float:
        """Asked once, when the sequence is queued. Less is served first, equals in order of arrival."""
        ...


def make_policy(name: str, predictor: LengthPredictor, max_tokens: int) -> Policy:
    """`max_tokens`: of a step. `ConfigError` for an unknown name."""
    if name == "fcfs":
        return FirstComeFirstServed()
    if name == "priority":
        return Priority()
    if name == "ssjf":
        return ShortestJobFirst(predictor, max_tokens)
    raise ConfigError(f"scheduling_policy is {name!r}; known: {', '.join(POLICIES)}", param="scheduling_policy")
