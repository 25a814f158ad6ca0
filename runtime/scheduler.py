"""`Scheduler`: decides at every step how many tokens each sequence advances.

There are no modes: decode is 1, a piece of a prompt is many. Continuous batching (Orca, OSDI 2022) with chunked prompts
(Sarathi-Serve, arXiv:2403.02310): sequences that decode go first, what is left of the budget goes to prompts. The order
is a `Policy`'s, first come, first served among equals. A sequence gets the pages of all its known tokens when it is
admitted, so that only decoding can run out of pages; then the one that is served last gives up its own and waits to be
computed again, or to get them back from host memory, whichever is measured to be cheaper.

Plain Python over ints, no arrays. Nobody starves: the first in order is never the victim of another, and what is
refused a place keeps its place in the queue, where only those that the policy prefers overtake it, and from `max_aging`
seconds after its arrival nobody: then what runs and what is as old and came earlier is all that is served before it.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter

from pyinfer.runtime.length_predictor import LengthPredictor
from pyinfer.runtime.page_moves import CopyPage, Move
from pyinfer.runtime.pages import PagePool
from pyinfer.runtime.policy import make_policy
from pyinfer.runtime.preemption_cost import PreemptionCost
from pyinfer.runtime.request import Request, Sequence, State
from pyinfer.runtime.request_events import EventKind, RequestEvent
from pyinfer.runtime.swap_space import SwapSpace

_by_key = attrgetter("key")


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


class Scheduler:
    """Owns the queue, the running sequences and their pages."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        clock: Callable[[], float] = time.monotonic,
        predictor: LengthPredictor | None = None,
    ) -> None:
        self.config = config
        self.pool = pool
        self.predictor = LengthPredictor() if predictor is None else predictor
        self.policy = make_policy(config.policy, self.predictor, config.max_tokens)
        self.cost = PreemptionCost(config.preemption_mode)
        self.swap = SwapSpace(config.n_swap_pages, self.cost)
        self._young: OrderedDict[Request, list[Sequence]] = OrderedDict()  # those that age, in order of arrival
        self.events: list[RequestEvent] = []  # of this step
        self._clock = clock
        self.waiting: list[Sequence] = []  # by key: rank, arrival, sample
        self.running: list[Sequence] = []  # by key
        self._free_slots = list(range(config.max_sequences - 1, -1, -1))
        self._repeated = Plan()
        self._n_repeats = 0  # how often it is still right if nobody comes or goes
        self.n_preemptions = 0
        self.n_prefix_queries = 0
        self.n_prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits into the pool when it is alone."""
        assert sequence.state is State.WAITING and -(-sequence.limit // self.config.block_size) <= self.pool.n_pages
        request = sequence.request
        rank = -math.inf
        if request.arrival_time > self._clock() - self.config.max_aging:
            rank = self.policy.rank(sequence)
            self._young.setdefault(request, []).append(sequence)
        sequence.key = (rank, *sequence.key[1:])
        insort(self.waiting, sequence, key=_by_key)
        self._n_repeats = 0

    def _promote_old(self) -> None:
        """Those that are `max_aging` old or older go before all others, among themselves in order of arrival."""
        born_before = self._clock() - self.config.max_aging
        while self._young and next(iter(self._young)).arrival_time <= born_before:
            _, sequences = self._young.popitem(last=False)
            for sequence in sequences:
                queue = self.waiting if sequence.state is State.WAITING else self.running
                queue.remove(sequence)
                sequence.key = (-math.inf, *sequence.key[1:])
                insort(queue, sequence, key=_by_key)

    def schedule(self) -> Plan:
        """Choose the next step; empty only when nothing waits or runs."""
        self.events = []
        if self._n_repeats > 0:
            self._n_repeats -= 1
            return self._repeated
        self._promote_old()
        plan = Plan()
        n_preemptions = self.n_preemptions
        budget, prompts = self._plan_decodes(plan)
        for sequence in prompts:
            if budget == 0:
                break
            if sequence.state is State.RUNNING:
                budget = self._plan(plan, sequence, budget)
        if self.n_preemptions == n_preemptions:
            self._admit_waiting(plan, budget)
        while not plan.sequences and self.waiting:  # all that run wait for one that does not: they give way
            self._preempt(plan, self.running[-1])
            self._admit_waiting(plan, budget)
        if self.config.multi_step > 1 and not self.waiting and len(plan.sequences) == len(self.running):
            self._plan_ahead(plan)
        return plan

    def _plan_ahead(self, plan: Plan) -> None:
        """All run: if all decode, the next steps are the same while their pages last, taken ahead if many are free."""
        n_repeats = n_steps = self.config.multi_step - 1
        for sequence in plan.sequences:
            n_tokens = len(sequence.tokens)
            if n_tokens - sequence.n_computed != 1:
                return
            n_more = min(n_steps, sequence.limit - n_tokens)
            if sequence.n_writable - n_tokens < n_more and self.pool.n_free > self.pool.n_pages // 4:
                sequence.pages.append(self.pool.allocate())
                sequence.n_writable = len(sequence.pages) * self.config.block_size
            n_repeats = min(n_repeats, sequence.n_writable - n_tokens)
        self._n_repeats = n_repeats
        self._repeated = Plan(plan.sequences, plan.counts)

    def _plan_decodes(self, plan: Plan) -> tuple[int, list[Sequence]]:
        """Plan everyone with one token to go; returns the budget left and those with more to go."""
        budget, n_chosen = self.config.max_tokens, 0
        prompts: list[Sequence] = []
        chosen = plan.sequences
        for sequence in self.running:  # preemption shortens it from the end
            n_tokens = len(sequence.tokens)
            if n_tokens - sequence.n_computed != 1:
                if n_tokens > sequence.n_computed:
                    prompts.append(sequence)
            elif n_chosen < budget and (n_tokens <= sequence.n_writable or self._take_page(plan, sequence)):
                chosen.append(sequence)
                n_chosen += 1
        plan.counts = [1] * n_chosen
        return budget - n_chosen, prompts

    def _take_page(self, plan: Plan, sequence: Sequence) -> bool:
        """A page of its own for the next token: a new one, or a copy of one that others hold too.

        Those that are served last give way for it; False if that was the sequence itself.
        """
        pool, pages = self.pool, sequence.pages
        index = sequence.n_computed // self.config.block_size
        while True:
            if index < len(pages) and pool.references[pages[index]] == 1:
                sequence.n_writable = len(pages) * self.config.block_size
                return True
            if pool.n_available:
                break
            self._preempt(plan, self.running[-1], sequence)
            if sequence.state is not State.RUNNING:
                return False
        page = pool.allocate()
        if index < len(pages):
            plan.moves.append(CopyPage(pages[index], page))
            pool.release([pages[index]])
            sequence.pages = [
                *pages[:index],
                page,
                *pages[index + 1 :],
            ]  # a new list: its row in the page tables is written again
        else:
            pages.append(page)
        sequence.n_writable = len(pages) * self.config.block_size
        return True

    def _plan(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        count = min(len(sequence.tokens) - sequence.n_computed, budget)
        plan.sequences.append(sequence)
        plan.counts.append(count)
        return budget - count

    def _admit_waiting(self, plan: Plan, budget: int) -> None:
        passed: list[Sequence] = []
        n_seen = 0
        for sequence in self.waiting:
            if sequence.is_paused:
                passed.append(sequence)
            elif budget == 0 or not self._free_slots or sequence.is_held or not self._admit(plan, sequence):
                break
            else:
                budget = self._plan(plan, sequence, budget)
            n_seen += 1
        self.waiting[:n_seen] = passed

    def _admit(self, plan: Plan, sequence: Sequence) -> bool:
        """Give a waiting sequence the pages of all its tokens, shared where the prefix is known; False if they lack."""
        block_size, pool = self.config.block_size, self.pool
        n_tokens = len(sequence.tokens)
        found: list[int] = []
        reads_cache = self.config.prefix_caching and sequence.reads_cache
        if reads_cache:  # at least one token is left to compute, for its logits
            found = pool.find(sequence.page_digests((n_tokens - 1) // block_size, block_size))
        n_new = -(-n_tokens // block_size) - len(found)
        # room for each running sequence to grow by a page, so that it does not at once throw out the new one
        reserve = min(len(self.running), pool.n_pages // 8)
        if n_new + pool.n_kept_among(found) + reserve > pool.n_available:
            return False
        for page in found:
            pool.share(page)
        sequence.pages = found + [pool.allocate() for _ in range(n_new)]
        sequence.n_computed = sequence.n_remembered = 0
        if found:
            sequence.n_remembered = len(found)
            sequence.n_computed = len(found) * block_size
        sequence.n_writable = len(sequence.pages) * block_size
        self.swap.give(sequence, len(found), plan.moves)
        if reads_cache:
            self.n_prefix_queries += n_tokens
            self.n_prefix_hits += len(found) * block_size
        if sequence.metrics.preemptions == 0:
            sequence.cached_tokens = sequence.n_computed
        self._note("scheduled", sequence, sequence.n_computed)
        sequence.slot = self._free_slots.pop()
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_by_key)
        return True

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let a waiting child whose tokens are the parent's run on its pages; False if it has to wait for its turn.

        The last page may be written to by both: who comes first takes a copy.
        """
        if parent.state is not State.RUNNING or not self._free_slots:
            return False
        self.waiting.remove(child)
        child.pages = parent.pages[: -(-parent.n_computed // self.config.block_size)]  # none that were taken ahead
        for page in child.pages:
            self.pool.share(page)
        self._n_repeats = 0
        child.n_computed, child.n_remembered = parent.n_computed, parent.n_remembered
        child.digests = list(parent.digests)
        child.prompt_was_computed = True
        child.n_due = parent.n_due
        child.n_writable = parent.n_writable = parent.n_computed
        child.slot = self._free_slots.pop()
        child.state = State.RUNNING
        insort(self.running, child, key=_by_key)
        return True

    def advance(self, sequence: Sequence, count: int) -> None:
        """Note that `count` more tokens of a running sequence are computed; full pages become findable."""
        sequence.n_computed += count
        if count > 1 or sequence.n_computed >= sequence.n_due:
            self._advanced(sequence, count)

    def _advanced(self, sequence: Sequence, count: int) -> None:
        """What most steps of decoding have no need of."""
        if count > 1 or not sequence.prompt_was_computed:
            self._note("prompt", sequence, count)
        sequence.prompt_was_computed |= sequence.n_computed >= sequence.n_prompt
        n_next: float = math.inf
        if self.config.prefix_caching:
            block_size = self.config.block_size
            n_full = sequence.n_computed // block_size
            if n_full > sequence.n_remembered:
                digests = sequence.page_digests(n_full, block_size)
                for i in range(sequence.n_remembered, n_full):
                    self.pool.remember(sequence.pages[i], digests[i])
                sequence.n_remembered = n_full
            n_next = (n_full + 1) * block_size
        sequence.n_due = n_next if sequence.prompt_was_computed else 0

    def _note(self, kind: EventKind, sequence: Sequence, n_tokens: int, by: str | None = None) -> None:
        self.events.append(RequestEvent(sequence.request.id, sequence.index, kind, self._clock(), n_tokens, by))

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back what it holds; nothing if it was finished before."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
            self.swap.drop(sequence)
        else:
            return
        sequence.state = State.FINISHED
        self._n_repeats = 0
        if young := self._young.get(sequence.request):
            young.remove(sequence)
            if not young:
                del self._young[sequence.request]

    def _preempt(self, plan: Plan, sequence: Sequence, by: Sequence | None = None) -> None:
        assert sequence is self.running[-1]
        self.running.pop()
        n_lost = 0 if self.swap.take(sequence, self.config.block_size, plan.moves) else sequence.n_computed
        self._note("preempted", sequence, n_lost, by.request.id if by else None)
        self._give_back(sequence)
        sequence.state = State.WAITING
        sequence.metrics.preemptions += 1
        self.n_preemptions += 1
        insort(self.waiting, sequence, key=_by_key)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(reversed(sequence.pages))
        self._free_slots.append(sequence.slot)
        sequence.pages = []
        sequence.n_writable = sequence.n_due = 0
        sequence.slot = -1
        sequence.n_computed = sequence.n_remembered = 0

    def check(self) -> None:
        """Assert that every sequence is in one place and that the pool knows of exactly the pages they hold."""
        block_size = self.config.block_size
        for queue, state in ((self.waiting, State.WAITING), (self.running, State.RUNNING)):
            assert all(sequence.state is state for sequence in queue)
            assert all(a.key < b.key for a, b in pairwise(queue)), "a queue is out of order"
        for sequence in self.waiting:
            assert not sequence.pages and sequence.slot == -1 and sequence.n_computed == 0
        self.swap.check(self.waiting)
        for sequence in self.running:
            assert sequence.swapped is None
            assert sequence.n_computed < len(sequence.tokens) + sequence.is_paused <= sequence.limit + 1
            assert len(sequence.tokens) <= sequence.limit
            assert sequence.n_computed <= len(sequence.pages) * block_size
            assert len(set(sequence.pages)) == len(sequence.pages), "a sequence holds a page twice"
            assert sequence.n_remembered * block_size <= sequence.n_computed
            last = sequence.n_computed // block_size
            assert sequence.n_writable <= len(sequence.pages) * block_size
            if sequence.n_writable > sequence.n_computed:
                assert all(self.pool.references[page] == 1 for page in sequence.pages[last:]), (
                    "a page to write is shared"
                )
        slots = [sequence.slot for sequence in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_sequences)), "slots leak"
        self.pool.check(page for sequence in self.running for page in sequence.pages)
