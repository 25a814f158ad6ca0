"""`Admission`: refuses a request that would wait too long, and says when to come back.

The wait is predicted by playing the queue forward: sequences end after their predicted lengths and give their places
and pages to those that wait, in their order; then decode steps and prompt tokens are turned into seconds as measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import chain

from pyinfer.errors import OverloadedError
from pyinfer.runtime.request import Sequence
from pyinfer.runtime.scheduler import Scheduler

_FORGET = 0.05  # weight of the newest measurement


class Admission:
    """`max_wait` in seconds until a request first runs; None refuses nobody."""

    def __init__(self, scheduler: Scheduler, max_wait: float | None) -> None:
        self._scheduler = scheduler
        self._max_wait = max_wait
        self.n_refused = 0
        self._seconds_per_step: float | None = None

    def note_step(self, n_tokens: int, n_sequences: int, seconds: float) -> None:
        """A step ran; only those that just decode tell how long one takes."""
        if n_tokens == n_sequences:
            old = self._seconds_per_step
            self._seconds_per_step = seconds if old is None else old + _FORGET * (seconds - old)

    def check(self, sequence: Sequence) -> None:
        """`OverloadedError` if a sequence that is not queued yet would wait too long."""
        if self._max_wait is None:
            return
        wait = self.predicted_wait(sequence)
        if wait > self._max_wait:
            seconds = max(1, math.ceil(wait - self._max_wait))
            self.n_refused += 1
            raise OverloadedError(
                f"this request would wait about {wait:.0f} s, and the limit is {self._max_wait:g} s; "
                f"try again in {seconds} s",
                retry_after=seconds,
            )

    def predicted_wait(self, sequence: Sequence) -> float:
        """Seconds until a sequence that is queued now first runs."""
        n_steps, n_tokens = self._play(sequence)
        seconds_per_token = self._scheduler.cost.seconds_per_token or 0.0
        return n_steps * (self._seconds_per_step or 0.0) + n_tokens * seconds_per_token

    def _play(self, newcomer: Sequence) -> tuple[int, int]:
        """Decode steps until the newcomer has a place, and prompt tokens to be computed before its own."""
        scheduler = self._scheduler
        pages = scheduler.pages
        ends = [(self._remaining(s), pages.n_held(s)) for s in scheduler.running]
        n_tokens = sum(len(s.tokens) - s.n_computed - 1 for s in scheduler.running if len(s.tokens) > s.n_computed)
        heapify(ends)
        n_places = scheduler.config.max_sequences - len(ends)
        n_pages = scheduler.pool.n_available
        now = 0
        for sequence in chain(self._ahead_of(newcomer), (newcomer,)):
            needed = pages.layout.most_pages(len(sequence.tokens))
            while ends and (n_places == 0 or n_pages < needed):
                now, n_freed = heappop(ends)
                n_places += 1
                n_pages += n_freed
            if sequence is newcomer:
                break
            n_places -= 1
            n_pages -= needed
            n_tokens += len(sequence.tokens)
            heappush(ends, (now + self._remaining(sequence), needed))
        return now, n_tokens

    def _ahead_of(self, newcomer: Sequence) -> Iterator[Sequence]:
        key = (self._scheduler.policy.rank(newcomer), *newcomer.key[1:])
        return (sequence for sequence in self._scheduler.waiting if sequence.key < key)

    def _remaining(self, sequence: Sequence) -> int:
        """Tokens, and so steps, that a sequence still runs for."""
        most = max(0, sequence.limit - len(sequence.tokens))
        predictor = self._scheduler.predictor
        return predictor.remaining(sequence.request.route, sequence.n_prompt, sequence.n_output, most)
