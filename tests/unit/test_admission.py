"""Admission: predicted waits are those that come, who would wait too long is refused, and taken when told to come."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from fake_stage import N_VOCAB, FakeStage, FakeVocabulary

from pyinfer.errors import OverloadedError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.graph.ops import F32Array
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.engine_client import EngineClient
from pyinfer.runtime.request import Request, Sequence
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit

STEP = 0.05  # seconds that a step takes
TOKEN = 0.001  # and each of its tokens beyond one a sequence


class TimedStage(FakeStage):
    now = 0.0
    pause = 0.0  # seconds that a step really takes

    def run(self, batch: Batch) -> F32Array:
        time.sleep(self.pause)
        self.now += STEP + TOKEN * (batch.n_tokens - batch.n_sequences)
        return super().run(batch)


class Office:
    """An engine whose clock is its stage's, and requests whose answers have known lengths."""

    def __init__(self, max_wait: float | None = None, *, n_pages: int = 512, policy: str = "priority") -> None:
        config = StageConfig(n_pages=n_pages, block_size=16, max_tokens=64, max_sequences=4, n_ctx=256)
        self.stage = TimedStage(config)
        self.engine = Engine(
            self.stage, config, FakeVocabulary(), clock=lambda: self.stage.now, max_queue_wait=max_wait, policy=policy
        )
        self.rng = random.Random(0)
        self.n_added = 0

    def prompt(self, length: int) -> list[int]:
        return self.rng.choices(range(N_VOCAB), k=length)

    def add(self, n_prompt: int, n_output: int) -> str:
        params = SamplingParams(max_tokens=n_output, ignore_eos=True, seed=0)
        name = str(self.n_added)
        self.n_added += 1
        self.engine.add_request(name, self.prompt(n_prompt), params, route=str(n_output))
        return name

    def predicted(self, n_prompt: int, route: str = "") -> float:
        request = Request("?", self.prompt(n_prompt), SamplingParams(), 10**9, route=route)
        return self.engine.admission.predicted_wait(Sequence(request, 0, limit=n_prompt + 100))

    def learn(self) -> None:
        for n_output in (20, 60):
            for _ in range(10):
                self.add(40, n_output)
        self.run()

    def run(self, until: str | None = None) -> float:
        """Step until a request gets its first token, or all are done; returns the time."""
        while self.engine.has_work:
            outputs = self.engine.step()
            if any(output.request_id == until for output in outputs):
                break
        return self.stage.now


@pytest.mark.parametrize("n_pages", [512, 20])
def test_predicted_waits_are_near_those_that_come(n_pages: int) -> None:
    office = Office(n_pages=n_pages)
    office.learn()
    assert office.predicted(40) == 0
    for n_waiting in (4, 8, 25):
        for _ in range(n_waiting):
            office.add(office.rng.randint(10, 90), office.rng.choice([20, 60]))
            office.engine.step()
        predicted, start = office.predicted(40), office.stage.now
        waited = office.run(office.add(40, 20)) - start
        assert 0.6 * waited - 0.3 <= predicted <= 1.5 * waited + 0.3
        office.run()


def test_who_would_wait_too_long_is_refused_and_taken_at_the_time_it_is_told() -> None:
    office = Office(max_wait=3.0)
    office.learn()
    n_refused = 0
    for _ in range(60):
        try:
            office.add(40, 60)
        except OverloadedError as error:
            n_refused += 1
            assert error.http_status == 429 and error.retry_after >= 1 and f"{error.retry_after} s" in str(error)
            told = office.stage.now + error.retry_after
    assert office.engine.stats().refusals == n_refused > 40
    office.engine.check()
    while office.stage.now < told:
        office.engine.step()
    office.add(40, 60)
    office.run()
    assert office.engine.stats().pages_used == 0 and not office.engine._requests


def test_without_a_limit_nobody_is_refused() -> None:
    office = Office()
    office.learn()
    for _ in range(500):
        office.add(100, 60)


def test_short_jobs_are_predicted_to_overtake() -> None:
    office = Office(policy="ssjf")
    office.learn()
    for _ in range(20):
        office.add(40, 60)
    for _ in range(10):
        office.engine.step()
    assert 0 < office.predicted(40, "20") < 0.5 * office.predicted(40, "60")


def test_a_client_gets_the_refusal_as_it_is() -> None:
    office = Office(max_wait=0.0)
    office.learn()
    office.stage.pause = 0.001  # else the first requests may be over before the last one is asked

    async def main() -> None:
        client = EngineClient.in_process(office.engine)
        try:
            params = SamplingParams(max_tokens=200, ignore_eos=True)
            streams = [client.generate([i], params) for i in range(40)]
            with pytest.raises(OverloadedError) as refusal:
                async for _ in streams[-1]:
                    pass
            assert refusal.value.retry_after >= 1
            async for _ in streams[0]:
                pass
        finally:
            client.close()

    asyncio.run(main())
