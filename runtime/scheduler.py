"""`Scheduler`: decides at every step how many tokens each sequence advances.

There are no modes: decode is 1, a piece of a prompt is many. Continuous batching (Orca, OSDI 2022) with chunked prompts
(Sarathi-Serve, arXiv:2403.02310): sequences that decode go first, what is left of the budget goes to prompts. The order
is a `Policy`'s, first come, first served among equals. A sequence gets the pages of all its known tokens when it is
admitted (`PageManager`), so that decoding runs out of pages, and hardly a prompt; then the one that is served last
gives up its own and waits to be computed again, or to get them back from host memory, whichever is measured to be
cheaper.

Plain Python over ints, no arrays. Nobody starves: the first in order is never the victim of another, and what is
refused a place keeps its place in the queue, where only those that the policy prefers overtake it, and from `max_aging`
seconds after its arrival nobody: then what runs and what is as old and came earlier is all that is served before it.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from operator import attrgetter

from pyinfer.graph.kv_groups import KVGroup
from pyinfer.runtime.length_predictor import LengthPredictor
from pyinfer.runtime.page_manager import ONE_GROUP, PageManager
from pyinfer.runtime.plan import Plan, SchedulerConfig
from pyinfer.runtime.policy import make_policy
from pyinfer.runtime.preemption_cost import PreemptionCost
from pyinfer.runtime.request import Request, Sequence, State
from pyinfer.runtime.request_events import EventKind, RequestEvent
from pyinfer.runtime.swap_space import SwapSpace

_by_key = attrgetter("key")


class Scheduler:
    """Owns the queue and the running sequences. `groups` are the model's KV groups, which share `n_pages`."""

    def __init__(
        self,
        config: SchedulerConfig,
        n_pages: int,
        clock: Callable[[], float] = time.monotonic,
        predictor: LengthPredictor | None = None,
        groups: Iterable[KVGroup] = ONE_GROUP,
    ) -> None:
        self.config = config
        self.predictor = LengthPredictor() if predictor is None else predictor
        self.policy = make_policy(config.policy, self.predictor, config.max_tokens)
        self.cost = PreemptionCost(config.preemption_mode)
        self.swap = SwapSpace(config.n_swap_pages, self.cost)
        self.pages = PageManager(config, n_pages, groups, self.swap)
        self.pool = self.pages.pool
        self._young: OrderedDict[Request, list[Sequence]] = OrderedDict()  # those that age, in order of arrival
        self.events: list[RequestEvent] = []  # of this step
        self._clock = clock
        self.waiting: list[Sequence] = []  # by key: rank, arrival, sample
        self.running: list[Sequence] = []  # by key
        self._free_slots = list(range(config.max_sequences - 1, -1, -1))
        self._repeated = Plan()
        self._n_repeats = 0  # how often it is still right if nobody comes or goes
        self.n_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits into the pool when it is alone."""
        assert sequence.state is State.WAITING
        assert self.pages.layout.most_pages(sequence.limit) <= self.pool.n_pages
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
            budget = self._plan(plan, sequence, budget)
        if self.n_preemptions == n_preemptions:
            self._admit_waiting(plan, budget)
        # all that run wait for one that does not: they give way, unless it is only for a step in flight
        while not plan.sequences and self.waiting and not any(sequence.n_coming for sequence in self.running):
            self._preempt(plan, self.running[-1])
            self._admit_waiting(plan, budget)
        if self.config.multi_step > 1 and not self.waiting and len(plan.sequences) == len(self.running):
            self._plan_ahead(plan)
        return plan

    @property
    def n_repeats(self) -> int:
        """How many steps after the last planned one are to be the same, if nobody comes or goes."""
        return self._n_repeats

    def ran_ahead(self, n: int) -> None:
        """So many of them were run with it."""
        self._n_repeats -= n

    def _plan_ahead(self, plan: Plan) -> None:
        """All run: if all decode, the next steps are the same while their pages last, taken ahead if many are free."""
        n_repeats = n_steps = self.config.multi_step - 1
        for sequence in plan.sequences:
            n_tokens = len(sequence.tokens)
            if n_tokens - sequence.n_computed != 1:
                return
            n_more = min(n_steps, sequence.limit - n_tokens)
            if sequence.n_writable - n_tokens < n_more and self.pool.n_free > self.pool.n_pages // 4:
                self.pages.take(sequence, sequence.n_writable + 1, plan.moves)
            n_repeats = min(n_repeats, sequence.n_writable - n_tokens)
        self._n_repeats = n_repeats
        self._repeated = Plan(plan.sequences, plan.counts)

    def _plan_decodes(self, plan: Plan) -> tuple[int, list[Sequence]]:
        """Plan everyone with one token to go; returns the budget left and those with more to go.

        Those get the pages of the largest piece of their prompt that may come next, in the order of all.
        """
        max_tokens = self.config.max_tokens
        n_chosen = 0
        prompts: list[Sequence] = []
        chosen = plan.sequences
        for sequence in self.running:  # preemption shortens it from the end
            n_tokens = len(sequence.tokens)
            if n_coming := sequence.n_coming:
                n_tokens += n_coming
                if n_tokens == sequence.limit:  # the last one is on its way
                    continue
            n_computed = sequence.n_computed
            if n_tokens - n_computed != 1:
                end = min(n_tokens, n_computed + max_tokens)
                if end > n_computed and (end <= sequence.n_writable or self._take_pages(plan, sequence, end)):
                    prompts.append(sequence)
            elif n_chosen < max_tokens and (
                n_tokens <= sequence.n_writable or self._take_pages(plan, sequence, n_tokens)
            ):
                chosen.append(sequence)
                n_chosen += 1
        plan.counts = [1] * n_chosen
        return max_tokens - n_chosen, prompts

    def _take_pages(self, plan: Plan, sequence: Sequence, end: int) -> bool:
        """Pages of its own for the tokens up to `end`.

        Those that are served last give way for it; False if that was the sequence itself.
        """
        while not self.pages.take(sequence, end, plan.moves):
            self._preempt(plan, self.running[-1], sequence)
            if sequence.state is not State.RUNNING:
                return False
        return True

    def _plan(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        count = min(sequence.n_tokens - sequence.n_computed, budget)
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
        if not self.pages.admit(sequence, len(self.running), plan.moves):
            return False
        if sequence.metrics.preemptions == 0:
            sequence.cached_tokens = sequence.n_computed
        self._note("scheduled", sequence, sequence.n_computed)
        self._run(sequence)
        return True

    def _run(self, sequence: Sequence) -> None:
        sequence.slot = self._free_slots.pop()
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_by_key)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let a waiting child whose tokens are the parent's run on its pages; False if it has to wait for its turn.

        The last page may be written to by both: who comes first takes a copy.
        """
        if parent.state is not State.RUNNING or not self._free_slots:
            return False
        self.waiting.remove(child)
        self.pages.fork(parent, child)
        self._n_repeats = 0
        child.prompt_was_computed = True
        child.n_due = parent.n_due
        self._run(child)
        return True

    def advance(self, sequence: Sequence, count: int) -> None:
        """Note that `count` more tokens of a running sequence are computed; full pages become findable."""
        sequence.n_computed += count
        if count > 1 or sequence.n_computed >= sequence.n_due:
            self._advanced(sequence, count)

    def started(self, sequence: Sequence, count: int) -> None:
        """Note that a step is in flight which computes `count` more tokens; `landed` follows, or the sequence fails."""
        sequence.n_computed += count
        sequence.n_flying += count

    def landed(self, sequence: Sequence, count: int) -> None:
        """What `advance` does, of a step that was noted by `started`; nothing if the sequence has given way since."""
        if sequence.state is State.RUNNING:
            sequence.n_flying -= count
            if count > 1 or sequence.n_computed - sequence.n_flying >= sequence.n_due:
                self._advanced(sequence, count)

    def _advanced(self, sequence: Sequence, count: int) -> None:
        """What most steps of decoding have no need of."""
        if count > 1 or not sequence.prompt_was_computed:
            self._note("prompt", sequence, count)
        sequence.prompt_was_computed |= sequence.n_computed - sequence.n_flying >= sequence.n_prompt
        n_next: float = math.inf
        if self.config.prefix_caching:
            n_next = self.pages.remember(sequence)
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
        n_lost = 0 if self.pages.keep_in_host(sequence, plan.moves) else sequence.n_computed
        self._note("preempted", sequence, n_lost, by.request.id if by else None)
        self._give_back(sequence)
        sequence.state = State.WAITING
        sequence.metrics.preemptions += 1
        self.n_preemptions += 1
        insort(self.waiting, sequence, key=_by_key)

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.give_back(sequence)
        self._free_slots.append(sequence.slot)
        sequence.n_due = 0
        sequence.slot = -1

    def check(self) -> None:
        """Assert that every sequence is in one place and that the pool knows of exactly the pages they hold."""
        for queue, state in ((self.waiting, State.WAITING), (self.running, State.RUNNING)):
            assert all(sequence.state is state for sequence in queue)
            assert all(a.key < b.key for a, b in pairwise(queue)), "a queue is out of order"
        for sequence in self.waiting:
            assert not sequence.tables and sequence.slot == -1 and sequence.n_computed == 0
        self.swap.check(self.waiting)
        for sequence in self.running:
            assert sequence.swapped is None
            assert sequence.n_computed < sequence.n_tokens + sequence.is_paused <= sequence.limit + 1
            assert sequence.n_tokens <= sequence.limit and 0 <= sequence.n_flying <= sequence.n_computed
        slots = [sequence.slot for sequence in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_sequences)), "slots leak"
        self.pages.check(self.running)
