"""Policies: who is served first, that nobody starves, what SSJF and continuous batching bring in steps."""

from __future__ import annotations

import importlib.util
import random
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pyinfer.errors import ConfigError, RequestError
from pyinfer.runtime.length_predictor import LengthPredictor
from pyinfer.runtime.plan import SchedulerConfig
from pyinfer.runtime.request import Request, Sequence
from pyinfer.runtime.request_limits import RequestLimits
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.scheduler import Scheduler

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "scheduling.py"
    spec = importlib.util.spec_from_file_location("scheduling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scheduling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Clocked:
    """One request at a time, a step a second."""

    def __init__(self, policy: str, max_aging: float = 1e9) -> None:
        self.now = 0.0
        config = SchedulerConfig(16, 64, 1, False, policy, max_aging=max_aging)
        self.scheduler = Scheduler(config, 64, clock=lambda: self.now)
        self.n_arrived = 0

    def add(self, name: str, n_output: int, *, priority: int = 0, route: str = "", most: int = 100) -> None:
        params = SamplingParams(priority=priority)
        request = Request(name, [1, 2], params, self.n_arrived, route=route, clock=lambda: self.now)
        self.n_arrived += 1
        sequence = Sequence(request, n_output, limit=2 + most)
        self.scheduler.add(sequence)

    def step(self) -> str:
        plan = self.scheduler.schedule()
        [sequence] = plan.sequences
        self.scheduler.advance(sequence, plan.counts[0])
        sequence.tokens.append(0)
        if sequence.n_output == sequence.index:
            self.scheduler.predictor.learn(sequence.request.route, sequence.n_prompt, sequence.n_output)
            self.scheduler.finish(sequence)
        self.scheduler.check()
        self.now += 1
        return sequence.request.id

    def order(self) -> str:
        names = []
        while self.scheduler.has_work:
            names.append(self.step())
        return "".join(dict.fromkeys(names))


def test_orders_of_the_policies() -> None:
    orders = {}
    for policy in ("fcfs", "priority", "ssjf"):
        driver = Clocked(policy)
        for i in range(8):
            driver.add("x", 2, route="short")
            driver.add("y", 30, route="long")
            driver.order()
            assert driver.n_arrived == 2 * i + 2
        driver.add("a", 30, route="long", priority=1)
        driver.add("b", 2, route="short", priority=2)
        driver.add("c", 30, route="long")
        driver.add("d", 2, route="short", priority=1)
        orders[policy] = driver.order()
    assert orders == {"fcfs": "abcd", "priority": "cadb", "ssjf": "bdac"}


def test_without_experience_the_limit_is_the_prediction() -> None:
    driver = Clocked("ssjf")
    driver.add("a", 5, most=90)
    driver.add("b", 5, most=10)
    assert driver.order() == "ba"


@pytest.mark.parametrize("policy", ["priority", "ssjf"])
def test_nobody_starves_under_an_endless_flow_of_the_preferred(policy: str) -> None:
    """Bound: from `max_aging` on, only what runs is served before it, here 2 steps."""

    def wait(max_aging: float) -> float:
        driver = Clocked(policy, max_aging)
        for _ in range(8):
            driver.add("x", 2, route="short")
            driver.add("y", 30, route="long")
            driver.order()
        started = driver.now
        driver.add("victim", 30, route="long", priority=1)
        while driver.now < started + 500:
            if len(driver.scheduler.waiting) < 3:
                driver.add("x", 2, route="short")
            if driver.step() == "victim":
                break
        return driver.now - 1 - started

    assert wait(1e9) > 490
    assert wait(100) <= 102
    assert wait(0) <= 2


def test_old_ones_go_in_order_of_arrival_and_are_not_preempted_by_younger_ones() -> None:
    driver = Clocked("priority", max_aging=10)
    driver.add("a", 3, priority=5)
    driver.add("b", 3, priority=9)
    driver.add("c", 3, priority=1)
    driver.now = 10
    driver.add("d", 3, priority=-1)
    assert driver.order() == "abcd"


def test_unknown_policy_and_useless_priority_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'lifo'.*fcfs, priority, ssjf"):
        Scheduler(SchedulerConfig(policy="lifo"), 4)
    limits = RequestLimits(100, 10, takes_priority=False)
    limits.check([1], SamplingParams())
    with pytest.raises(RequestError, match="priority is 3"):
        limits.check([1], SamplingParams(priority=3))


def test_predictor_knows_routes_and_octaves_and_falls_back() -> None:
    predictor = LengthPredictor()
    assert predictor.remaining("a", 5, 0, 77) == 77
    for i in range(8):
        predictor.learn("a", 5, 10 + i)
    assert predictor.remaining("a", 7, 0, 77) == 14
    assert predictor.remaining("a", 100, 0, 77) == predictor.remaining("b", 5, 0, 77) == 14, "wider kinds"
    for i in range(8):
        predictor.learn("a", 100, 50 + i)
        predictor.learn("b", 5, 3)
    assert predictor.remaining("a", 100, 0, 77) == 54
    assert predictor.remaining("b", 5, 0, 77) == 3
    assert predictor.remaining("a", 5, 0, 9) == 9, "never over the limit"
    assert predictor.remaining("a", 5, 15, 77) == 2, "16 and 17 are left"
    assert predictor.remaining("a", 5, 40, 77) == 20, "longer than all that are known"


def test_predictor_forgets_what_is_long_ago() -> None:
    rng = random.Random(0)
    predictor = LengthPredictor()
    for _ in range(2000):
        predictor.learn("a", 5, rng.randint(1000, 2000))
    lengths = [rng.randint(1, 300) for _ in range(256)]
    for length in lengths:
        predictor.learn("a", 5, length)
    for quantile in (0.1, 0.5, 0.9):
        expected = sorted(lengths)[int(256 * quantile)]
        assert predictor.remaining("a", 5, 0, 10_000, quantile) == expected


def test_ssjf_halves_the_mean_latency_and_bounds_the_worst_wait(simulation: ModuleType) -> None:
    jobs = simulation.heavy_tailed_mix(2000)
    aging = 4000
    outcomes = {policy: simulation.policy_outcomes(policy, jobs, aging) for policy in ("fcfs", "ssjf")}
    mean = {policy: statistics.mean(o.latency for o in each) for policy, each in outcomes.items()}
    assert mean["ssjf"] * 2 <= mean["fcfs"]
    longest_job = max(job.n_output for job in jobs)
    assert max(o.wait for o in outcomes["ssjf"]) <= aging + longest_job
    assert max(o.wait for o in outcomes["fcfs"]) > 1000, "the mix does queue"


def test_continuous_batching_takes_a_third_of_the_steps(simulation: ModuleType) -> None:
    queue = simulation.uneven_queue()
    assert simulation.static_steps(queue, 8) == 400
    assert simulation.continuous_steps(queue, 8) <= 132
