"""What happens to a request inside the engine, for its timeline; plain messages that can cross a process boundary."""

from __future__ import annotations

from typing import Literal

import msgspec

EventKind = Literal["scheduled", "prompt", "preempted"]


class RequestEvent(msgspec.Struct, array_like=True):
    """`time` is that of `time.monotonic`, in seconds."""

    request_id: str
    index: int  # which of the `n` samples
    kind: EventKind
    time: float
    n_tokens: int = 0  # scheduled: found in the prefix cache; prompt: read in this step; preempted: to compute again
    by: str | None = None  # preempted: the request that needed the pages
