"""`Plan`: what the scheduler decided for one step; `SchedulerConfig`: what it may decide."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyinfer.runtime.page_moves import Move
from pyinfer.runtime.request import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    block_size: int = 16
    max_tokens: int = 512  # per step, over all sequences
    max_sequences: int = 256
    prefix_caching: bool = True
    policy: str = "priority"
    preemption_mode: str = "auto"
    n_swap_pages: int = 0  # room in host memory for the pages of those that gave way
    multi_step: int = 1  # most steps that one decision is good for; 1: each step is decided anew
    max_aging: float = 60.0  # seconds after its arrival, a request goes before all that are younger than that


@dataclass(slots=True)
class Plan:
    """One step: sequence i advances by counts[i] tokens. Those that decode come first."""

    sequences: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)  # of pages, to be made first, in this order
