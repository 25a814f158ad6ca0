"""What the scheduler's decisions bring, counted in steps: no model, no clock, the same on every machine.

python benchmarks/scheduling.py            static against continuous batching; FCFS against SSJF
python benchmarks/scheduling.py --cost     microseconds that a step's scheduling takes at 256 running requests
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass

from pyinfer.graph.kv_groups import KVGroup
from pyinfer.runtime.page_manager import ONE_GROUP
from pyinfer.runtime.plan import SchedulerConfig
from pyinfer.runtime.request import Request, Sequence, State
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.scheduler import Scheduler


@dataclass(frozen=True)
class Job:
    arrival: int  # step
    route: str
    n_prompt: int
    n_output: int
    most: int = 4096  # max_tokens: all that the scheduler is told


@dataclass(frozen=True)
class Outcome:
    """In steps since the job's arrival."""

    wait: int  # until it first runs
    latency: int  # until its last token


class Simulation:
    """A scheduler whose step takes one unit of time, whatever it does; its stage always knows a next token."""

    def __init__(self, config: SchedulerConfig, n_pages: int) -> None:
        self.now = 0
        self.scheduler = Scheduler(config, n_pages, clock=lambda: float(self.now))

    def run(self, jobs: list[Job]) -> list[Outcome]:
        """All jobs, which are in order of arrival; outcomes in the same order."""
        started: dict[int, int] = {}
        ended: dict[int, int] = {}
        arrived = 0
        while arrived < len(jobs) or self.scheduler.has_work:
            while arrived < len(jobs) and jobs[arrived].arrival <= self.now:
                self._add(arrived, jobs[arrived])
                arrived += 1
            plan = self.scheduler.schedule()
            self.now += 1
            for sequence, count in zip(plan.sequences, plan.counts, strict=True):
                number = sequence.request.arrival_number
                started.setdefault(number, self.now - 1)
                self.scheduler.advance(sequence, count)
                if sequence.n_computed == len(sequence.tokens):
                    sequence.tokens.append(0)
                    if sequence.n_output == jobs[number].n_output:
                        self.scheduler.predictor.learn(sequence.request.route, sequence.n_prompt, sequence.n_output)
                        self.scheduler.finish(sequence)
                        ended[number] = self.now
        return [Outcome(started[i] - job.arrival, ended[i] - job.arrival) for i, job in enumerate(jobs)]

    def _add(self, number: int, job: Job) -> None:
        prompt = [number % 2**31] * job.n_prompt
        request = Request(
            str(number), prompt, SamplingParams(), number, route=job.route, clock=lambda: float(job.arrival)
        )
        self.scheduler.add(Sequence(request, 0, limit=job.n_prompt + job.most))


def uneven_queue() -> list[Job]:
    """32 requests at once; numbers 0, 8, 16 and 24 ask for 100 tokens, the others for 10."""
    return [Job(0, "", 4, 100 if i % 8 == 0 else 10) for i in range(32)]


def static_steps(jobs: list[Job], batch: int) -> int:
    """Each batch takes as long as its longest request; a prompt's step yields its first token."""
    return sum(max(job.n_output for job in jobs[i : i + batch]) for i in range(0, len(jobs), batch))


def continuous_steps(jobs: list[Job], batch: int) -> int:
    simulation = Simulation(SchedulerConfig(max_sequences=batch, prefix_caching=False), 10_000)
    return max(outcome.latency for outcome in simulation.run(jobs))


def heavy_tailed_mix(n: int, seed: int = 0) -> list[Job]:
    """Three routes whose answers differ in length, as those to long prompts do; arrivals in bursts."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    arrival = 0.0
    for i in range(n):
        if i % 40 == 0:
            arrival += 1100 * rng.expovariate(1.0)
        kind = rng.random()
        if kind < 0.6:
            route, n_prompt, n_output = "classify", rng.randint(64, 512), rng.randint(2, 12)
        elif kind < 0.9:
            n_prompt = rng.choice([rng.randint(8, 30), rng.randint(128, 250)])
            route, n_output = "chat", int(rng.lognormvariate(3.0 if n_prompt < 64 else 4.6, 0.5)) + 1
        else:
            route, n_prompt, n_output = "write", rng.randint(128, 1023), int(400 * rng.paretovariate(1.3))
        jobs.append(Job(int(arrival), route, n_prompt, min(n_output, 4096)))
    return jobs


def policy_outcomes(policy: str, jobs: list[Job], max_aging: float) -> list[Outcome]:
    config = SchedulerConfig(max_sequences=8, policy=policy, prefix_caching=False, max_aging=max_aging)
    return Simulation(config, 100_000).run(jobs)


def step_cost(groups: tuple[KVGroup, ...] = ONE_GROUP, n: int = 256, n_steps: int = 2000) -> float:
    """Mean microseconds of processor time of `schedule` and `advance` for a step of n decoding requests."""
    config = SchedulerConfig(max_tokens=8192, max_sequences=n)
    scheduler = Scheduler(config, len(groups) * n * (n_steps // 16 + 4), groups=groups)
    for i in range(n):
        request = Request(str(i), [i] * 16, SamplingParams(), i)
        scheduler.add(Sequence(request, 0, limit=n_steps + 32))
    spent = 0.0
    for _ in range(n_steps + 1):
        start = time.thread_time()
        plan = scheduler.schedule()
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            scheduler.advance(sequence, count)
        spent += time.thread_time() - start
        for sequence in plan.sequences:
            sequence.tokens.append(0)
    assert all(s.state is State.RUNNING for s in plan.sequences) and len(plan.sequences) == n
    return spent / (n_steps + 1) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--max-aging", type=int, default=4000, help="steps")
    args = parser.parse_args()
    if args.cost:
        gemma = (KVGroup((0,)), *(KVGroup((i,), 512) for i in range(1, 6)))
        for groups in (ONE_GROUP, gemma):
            print(
                f"{step_cost(groups):.0f} microseconds a step at 256 running requests, {len(groups)} groups of layers"
            )
        return
    queue = uneven_queue()
    print(f"uneven queue: static batching {static_steps(queue, 8)} steps, continuous {continuous_steps(queue, 8)}")
    jobs = heavy_tailed_mix(args.requests)
    print(f"heavy-tailed mix of {len(jobs)} requests, 8 at a time, steps:")
    for policy in ("fcfs", "ssjf"):
        outcomes = policy_outcomes(policy, jobs, args.max_aging)
        latencies = [outcome.latency for outcome in outcomes]
        waits = sorted(outcome.wait for outcome in outcomes)
        print(
            f"  {policy}: mean latency {statistics.mean(latencies):.0f}, median {statistics.median(latencies):.0f}, "
            f"wait p99 {waits[len(waits) * 99 // 100]}, worst wait {waits[-1]}"
        )


if __name__ == "__main__":
    main()
