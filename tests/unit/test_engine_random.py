"""The engine through random arrivals, cancels, preemptions, forks, swaps, evictions and failing steps.

After each step the books are checked; every text is the one its request gets alone.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fake_stage import ONE_GROUP, FakeStage, FakeVocabulary
from plain_engine import alone, beams_alone, prompt_of
from sampling_stage import OverlappingFake

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.kv_groups import KVGroup
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.page_moves import CopyPage
from pyinfer.runtime.plan import Plan
from pyinfer.runtime.request import Sequence
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit

TIGHT = StageConfig(n_pages=14, block_size=16, max_tokens=24, max_sequences=6, n_ctx=200)
# what a model's layers may be like: full and sliding ones, two windows, only sliding ones; pages as scarce as in TIGHT
GROUPS: dict[str, tuple[StageConfig, tuple[KVGroup, ...]]] = {
    "full": (TIGHT, ONE_GROUP),
    "mixed": (replace(TIGHT, n_pages=28), (KVGroup((0,)), KVGroup((1,), 40), KVGroup((2,), 40))),
    "windows": (
        replace(TIGHT, n_pages=90, block_size=4),
        (KVGroup((0,)), KVGroup((1,), 24), KVGroup((2,), 8), KVGroup((3,), 24)),
    ),
    "sliding": (replace(TIGHT, n_pages=8, block_size=16), (KVGroup((0,), 40),)),
    "1": (replace(TIGHT, n_pages=500, block_size=1), (KVGroup((0,)), KVGroup((1,), 30))),
    "64": (replace(TIGHT, n_pages=9, block_size=64), (KVGroup((0,)), KVGroup((1,), 40))),
}
MAX_AGING = 400  # steps; `LONGEST` is what may still be served before one that is as old
LONGEST = 2200


@dataclass
class Job:
    prompt: list[int]
    params: SamplingParams | BeamSearchParams
    arrived: int
    stage: FakeStage
    got: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    is_over: bool = False

    def take(self, output: RequestOutput) -> int:
        """Note a chunk; how many texts were compared."""
        self.got.setdefault(output.index, []).extend(output.new_token_ids)
        if output.failure is not None:
            self.is_over = True
        elif output.finish_reason is not None:
            self.ended.add(output.index)
            self.is_over = len(self.ended) == self.n_texts
            return self.compare(output)
        return 0

    @property
    def n_texts(self) -> int:
        return self.params.n if isinstance(self.params, SamplingParams) else self.params.beam_width

    def compare(self, output: RequestOutput) -> int:
        if isinstance(self.params, SamplingParams):
            assert self.got[output.index] == alone(self.prompt, self.params, output.index, TIGHT.n_ctx, self.stage)
            return 1
        if self.is_over:
            expected = beams_alone(self.prompt, self.params, TIGHT.n_ctx, self.stage)
            assert [self.got[i] for i in range(len(self.got))] == [tokens for tokens, _ in expected]
        return self.is_over


class Run:
    """An engine and those who use it; a step is a second."""

    def __init__(self, seed: int, priorities: list[int], options: dict[str, Any]) -> None:
        self.rng = random.Random(seed)
        config, groups = GROUPS[options.pop("layers", "full")]
        self.overlaps = options.pop("overlaps", False)
        self.stage = OverlappingFake(config, groups=groups) if self.overlaps else FakeStage(config, groups=groups)
        self.n_steps = 0
        self.engine = Engine(
            self.stage,
            config,
            FakeVocabulary(),
            kv_groups=groups,
            clock=lambda: float(self.n_steps),
            max_aging=MAX_AGING,
            **options,
        )
        if "preemption_mode" not in options:
            self.engine.scheduler.cost.prefers_swap = lambda *sizes: self.rng.random() < 0.5  # type: ignore[method-assign]
        self.priorities = priorities
        self.families = [prompt_of(150, seed) for seed in range(4)]
        self.jobs: dict[str, Job] = {}
        self.seen: Counter[str] = Counter()
        self.longest = 0

    def arrive(self) -> None:
        rng = self.rng
        n_prompt = rng.randint(1, 40 if self.overlaps else 120)
        prompt = rng.choice(self.families)[:n_prompt] + prompt_of(rng.randint(0, 8), rng.randrange(10**9))
        name = f"{self.n_steps}-{rng.randrange(10**9)}"
        is_plain = self.overlaps and rng.random() < 0.97  # what is not keeps all others from overlapping
        if not is_plain and rng.random() < 0.05:
            beams = BeamSearchParams(
                beam_width=rng.randint(1, 4), max_tokens=rng.randint(1, 12), ignore_eos=rng.random() < 0.9
            )
            self.engine.add_beam_search(name, prompt, beams)
            self.jobs[name] = Job(prompt, beams, self.n_steps, self.stage)
            return
        params = SamplingParams(
            n=1 if is_plain else rng.choice([1, 1, 1, 2, 3, 5]),
            temperature=rng.choice([0, 1.0]),
            max_tokens=rng.choice([1, 3, 20, 80, None]),
            seed=rng.randrange(1000),
            priority=rng.choice(self.priorities),
            prompt_logprobs=None if is_plain else rng.choice([None] * 9 + [0]),
        )
        self.engine.add_request(name, prompt, params, route=str(params.max_tokens))
        self.jobs[name] = Job(prompt, params, self.n_steps, self.stage)

    def cancel(self) -> None:
        name = self.rng.choice(list(self.jobs))
        job = self.jobs[name]
        index = self.rng.choice([None, 0])
        for output in self.engine.abort(name, index):
            job.ended.add(output.index)
        job.is_over = index is None or isinstance(job.params, BeamSearchParams) or len(job.ended) == job.n_texts
        self.seen["cancelled"] += 1

    def step(self, *, may_arrive: bool) -> None:
        rng = self.rng
        if may_arrive and len(self.jobs) < 12 and rng.random() < (0.3 if self.overlaps else 0.15):
            for _ in range(rng.randint(1, 4)):
                self.arrive()
        if self.jobs and rng.random() < 0.02:
            self.cancel()
        if rng.random() < 0.002:
            self.stage.fail_at = self.stage.n_steps + 1
        for output in self.engine.step():
            self.seen["compared"] += self.jobs[output.request_id].take(output)
            self.seen["failed"] += output.failure is not None
        self.engine.check()
        for name in [name for name, job in self.jobs.items() if job.is_over]:
            self.longest = max(self.longest, self.n_steps - self.jobs.pop(name).arrived)
        self.n_steps += 1


def watch(run: Run, *, is_fcfs: bool) -> None:
    """Count the copies on write. Without priorities the sequence that came first advances in every step.

    A beam that found no place for its fork may wait beside those that came later.
    """
    schedule = run.engine.scheduler.schedule

    def watched() -> Plan:
        everyone: list[Sequence] = [*run.engine.scheduler.waiting, *run.engine.scheduler.running]
        plan = schedule()
        first = min(everyone, key=lambda s: s.key) if everyone else None
        if is_fcfs and first is not None and first.request.beams is None:
            assert first in plan.sequences or first.n_tokens == first.limit
        run.seen["copies"] += sum(isinstance(move, CopyPage) for move in plan.moves)
        return plan

    run.engine.scheduler.schedule = watched  # type: ignore[method-assign]


SWAP = {"preemption_mode": "swap", "n_swap_pages": 12}
CASES: list[Any] = [
    (4_000, [0], {"preemption_mode": "recompute"}),
    (4_000, [0], {**SWAP, "policy": "fcfs"}),
    (1_000, [0], {**SWAP, "prefix_caching": False}),
    (1_000, [0, 0, 1, -1], {"n_swap_pages": 30}),
    (1_000, [0], {**SWAP, "policy": "ssjf"}),
    (1_000, [0], {**SWAP, "multi_step": 8}),
    (2_500, [0], {**SWAP, "n_swap_pages": 40, "layers": "mixed"}),
    (1_000, [0], {"preemption_mode": "recompute", "layers": "mixed", "multi_step": 4}),
    (1_000, [0, 0, 1, -1], {"n_swap_pages": 100, "layers": "windows"}),
    (2_000, [0], {**SWAP, "layers": "sliding"}),
    (500, [0], {**SWAP, "n_swap_pages": 400, "layers": "1"}),
    (1_000, [0], {**SWAP, "prefix_caching": False, "layers": "64"}),
    (3_000, [0], {**SWAP, "overlaps": True}),
    (2_000, [0, 0, 1, -1], {"preemption_mode": "recompute", "overlaps": True}),
    (2_000, [0], {**SWAP, "n_swap_pages": 40, "layers": "mixed", "overlaps": True}),
    (1_000, [0], {**SWAP, "layers": "sliding", "overlaps": True}),
]
LARGE: list[Any] = [
    pytest.param(10 * n, priorities, options, seed, marks=[pytest.mark.large, pytest.mark.timeout(0)])
    for seed in range(5)
    for n, priorities, options in CASES
]


@pytest.mark.parametrize(("n_wanted", "priorities", "options", "seed"), [*((*case, 0) for case in CASES), *LARGE])
def test_random_steps_keep_every_promise(
    n_wanted: int, priorities: list[int], options: dict[str, Any], seed: int
) -> None:
    """20,000 steps; 1,000,000 in the large tier."""
    run = Run(seed, priorities, dict(options))
    watch(run, is_fcfs=len(priorities) == 1 and options.get("policy") != "ssjf")
    while run.n_steps < n_wanted or run.engine.has_work:
        run.step(may_arrive=run.n_steps < n_wanted)
    stats, seen = run.engine.stats(), run.seen
    assert not run.jobs and stats.pages_used == 0 and not run.engine._requests
    assert seen["compared"] > n_wanted / 20 and seen["cancelled"] > n_wanted / 200
    assert seen["failed"] > n_wanted / 2000 or n_wanted < 4_000
    assert seen["copies"] > n_wanted / 100 or options.get("layers") == "1" or run.overlaps
    if isinstance(run.stage, OverlappingFake):
        assert n_wanted / 2 < run.stage.n_started < n_wanted * 1.2
    assert stats.preemptions > n_wanted / 200
    assert (stats.swaps > n_wanted / 400) == (options.get("n_swap_pages", 0) > 0)
    assert (stats.prefix_hits > n_wanted / 4) == options.get("prefix_caching", True)
    assert run.longest < MAX_AGING + LONGEST
