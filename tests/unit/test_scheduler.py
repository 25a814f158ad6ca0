"""Scheduler: what advances, in which order, who gives way, and that its books balance."""

from __future__ import annotations

import pytest

from pyinfer.runtime.plan import Plan, SchedulerConfig
from pyinfer.runtime.request import Request, Sequence, State
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.scheduler import Scheduler

pytestmark = pytest.mark.unit


class Driver:
    """Plays the engine: every sequence that has computed all its tokens gets a next one."""

    def __init__(self, n_pages: int = 64, **config: int | bool) -> None:
        settings = {"block_size": 4, "max_tokens": 16, "max_sequences": 4, **config}
        self.scheduler = Scheduler(SchedulerConfig(**settings), n_pages)  # type: ignore[arg-type]
        self.n_arrived = 0

    def add(self, prompt: list[int] | int, n_output: int = 8, priority: int = 0, n: int = 1) -> list[Sequence]:
        base = 1000 * (self.n_arrived + 1)
        tokens = list(range(base, base + prompt)) if isinstance(prompt, int) else prompt
        request = Request(str(self.n_arrived), tokens, SamplingParams(priority=priority), self.n_arrived)
        self.n_arrived += 1
        for index in range(n):
            leader = request.sequences[0] if index else None
            sequence = Sequence(request, index, limit=len(tokens) + n_output, leader=leader)
            request.sequences.append(sequence)
            self.scheduler.add(sequence)
        return request.sequences

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert sum(plan.counts) <= self.scheduler.config.max_tokens
        assert bool(plan.sequences) == self.scheduler.has_work
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            self.scheduler.advance(sequence, count)
            if sequence.n_computed == len(sequence.tokens):
                sequence.tokens.append(len(sequence.tokens) * 7 + sequence.index)
                if len(sequence.tokens) == sequence.limit:
                    self.scheduler.finish(sequence)
        self.scheduler.check()
        return plan

    def shape(self) -> list[tuple[str, int]]:
        plan = self.step()
        return [(s.request.id, count) for s, count in zip(plan.sequences, plan.counts, strict=True)]


def test_decode_goes_first_and_prompts_fill_the_rest_of_the_budget() -> None:
    driver = Driver()
    driver.add(3)
    assert driver.shape() == [("0", 3)]
    driver.add(40)
    driver.add(2)
    assert driver.shape() == [("0", 1), ("1", 15)]
    assert driver.shape() == [("0", 1), ("1", 15)]
    assert driver.shape() == [("0", 1), ("1", 10), ("2", 2)]
    assert driver.shape() == [("0", 1), ("1", 1), ("2", 1)]


def test_no_more_sequences_than_allowed_and_the_queue_keeps_its_order() -> None:
    driver = Driver(max_sequences=2)
    for _ in range(4):
        driver.add(1, n_output=3)
    orders = [[name for name, _ in driver.shape()] for _ in range(6)]
    assert orders == [["0", "1"]] * 3 + [["2", "3"]] * 3


def test_lower_priority_values_are_served_first() -> None:
    driver = Driver(max_sequences=1)
    driver.add(1, n_output=2)
    driver.add(1, n_output=1, priority=5)
    driver.add(1, n_output=1, priority=-1)
    driver.add(1, n_output=1, priority=5)
    assert [driver.shape()[0][0] for _ in range(5)] == ["2", "0", "0", "1", "3"]


def test_last_in_order_gives_way_when_pages_run_out_and_is_computed_again() -> None:
    driver = Driver(n_pages=8, max_sequences=3)
    first, second = driver.add(8, n_output=20)[0], driver.add(8, n_output=20)[0]
    for _ in range(60):
        driver.step()
        if second.metrics.preemptions:
            break
    assert second.state is State.WAITING and second.n_computed == 0 and not second.tables
    assert first.state is State.RUNNING and first.metrics.preemptions == 0
    while driver.scheduler.has_work:
        driver.step()
    assert len(first.tokens) == len(second.tokens) == 28
    assert driver.scheduler.n_preemptions == second.metrics.preemptions
    assert driver.scheduler.pool.n_held == 0


def test_preempted_sequence_comes_back_before_later_arrivals() -> None:
    driver = Driver(n_pages=8, max_sequences=3)
    driver.add(8, n_output=20)
    second = driver.add(8, n_output=20)[0]
    while not second.metrics.preemptions:
        driver.step()
    third = driver.add(1, n_output=1)[0]
    while second.state is State.WAITING:
        driver.step()
        assert third.state is State.WAITING or second.state is State.RUNNING  # type: ignore[comparison-overlap]


def test_prefix_is_reused_but_one_token_is_left_to_compute() -> None:
    driver = Driver()
    prompt = list(range(12))
    driver.add(prompt, n_output=1)
    assert driver.shape() == [("0", 12)]
    again = driver.add(prompt, n_output=1)[0]
    assert driver.shape() == [("1", 4)], "pages of 4: the last one is computed again for its logits"
    assert again.cached_tokens == 8
    longer = driver.add([*prompt, 99], n_output=1)[0]
    assert driver.shape() == [("2", 1)]
    assert longer.cached_tokens == 12
    other = driver.add([5, *prompt[1:]], n_output=1)[0]
    assert driver.shape() == [("3", 12)] and other.cached_tokens == 0


def test_sequence_that_must_not_read_the_cache_does_not() -> None:
    driver = Driver()
    prompt = list(range(12))
    driver.add(prompt, n_output=1)
    driver.step()
    [sequence] = driver.add(prompt, n_output=1)
    sequence.reads_cache = False
    assert driver.shape() == [("1", 12)]


def test_answers_are_reused_as_prefix_of_the_next_turn() -> None:
    driver = Driver()
    [first] = driver.add(6, n_output=7)
    while driver.scheduler.has_work:
        driver.step()
    [second] = driver.add([*first.tokens, 1, 2, 3], n_output=1)
    driver.step()
    assert second.cached_tokens == 12


def test_samples_of_a_request_share_the_prompt() -> None:
    driver = Driver()
    samples = driver.add(13, n_output=4, n=3)
    assert driver.shape() == [("0", 13)], "the others wait until the prompt is known"
    assert driver.shape() == [("0", 1)] * 3
    assert len({tuple(s.tables[0][:3]) for s in samples}) == 1
    assert len({s.tables[0][3] for s in samples}) == 3
    while driver.scheduler.has_work:
        driver.step()
    assert driver.scheduler.pool.n_held == 0


def test_samples_go_on_when_the_first_is_cancelled_early() -> None:
    driver = Driver(max_tokens=4)
    first, second = driver.add(9, n_output=2, n=2)
    driver.step()
    driver.scheduler.finish(first)
    while driver.scheduler.has_work:
        driver.step()
    assert len(second.tokens) == 11


def test_cancel_while_waiting_and_while_running_frees_everything() -> None:
    driver = Driver(max_sequences=1)
    [running], [waiting] = driver.add(9), driver.add(9)
    driver.step()
    driver.scheduler.finish(waiting)
    driver.scheduler.check()
    driver.scheduler.finish(running)
    driver.scheduler.finish(running)
    driver.scheduler.check()
    assert not driver.scheduler.has_work and driver.scheduler.pool.n_held == 0


def test_a_sequence_that_needs_every_page_gets_them() -> None:
    driver = Driver(n_pages=4)
    driver.add(3, n_output=5)
    [large] = driver.add(10, n_output=6)
    while driver.scheduler.has_work:
        driver.step()
    assert len(large.tokens) == 16


def test_static_batching_example_takes_at_most_132_steps() -> None:
    """Queue 32, batch 8, requests 0, 8, 16 and 24 ask for 100 tokens and the rest for 10: static batching takes 400."""
    driver = Driver(n_pages=512, max_sequences=8, max_tokens=512)
    for i in range(32):
        driver.add(4, n_output=100 if i % 8 == 0 else 10)
    n_steps = 0
    while driver.scheduler.has_work:
        driver.step()
        n_steps += 1
    assert n_steps <= 132


def test_check_sees_a_lost_page_and_a_lost_slot() -> None:
    driver = Driver()
    [sequence] = driver.add(9)
    driver.step()
    page = sequence.tables[0].pop()
    with pytest.raises(AssertionError):
        driver.scheduler.check()
    sequence.tables[0].append(page)
    driver.scheduler.check()
    sequence.slot += 1
    with pytest.raises(AssertionError):
        driver.scheduler.check()
