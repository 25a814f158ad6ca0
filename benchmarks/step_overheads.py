"""Where a decode step's time goes besides the model, and what deciding several steps at once brings.

    python benchmarks/step_overheads.py MODEL.gguf [-t THREADS] [-B 1,8,32] [-n 64]

Runs greedy requests with `multi_step` 1 and 8 in turn, in this process, and prints medians in microseconds a step:
the stage's wall time; the processor time of the rest of the engine's step, of scheduling alone, and of turning its
chunks into text. The last is what a server's other process does while the next step runs, and `LLM` does not.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyinfer.runtime.hub import resolve
from pyinfer.runtime.loader import LoadedModel, load_model
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.text_stream import TextStream


class Timer:
    """Sums the seconds that calls of a function take."""

    def __init__(self, owner: Any, name: str, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        function = getattr(owner, name)

        def timed(*args: Any) -> Any:
            start = clock()
            result = function(*args)
            self.seconds += clock() - start
            return result

        setattr(owner, name, timed)

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(model: LoadedModel, batch: int, n_tokens: int) -> dict[str, float]:
    """Medians over the steps in which all requests decode, in microseconds."""
    engine = model.engine
    params = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True)
    rng = random.Random(0)
    streams = {}
    for i in range(batch):
        engine.add_request(str(i), rng.choices(range(1000, 5000), k=16), params)
        streams[str(i)] = TextStream(model.tokenizer, params)
    wall = Timer(engine._stage, "run", time.perf_counter)
    stage, schedule = (
        Timer(owner, name, time.thread_time) for owner, name in ((engine._stage, "run"), (engine.scheduler, "schedule"))
    )
    rows: dict[str, list[float]] = {"stage": [], "engine": [], "schedule": [], "text": []}
    while engine.has_work:
        start = time.thread_time()
        outputs = engine.step()
        spent = time.thread_time() - start
        start = time.thread_time()
        for output in outputs:
            streams[output.request_id].push(output)
        text = time.thread_time() - start
        values = (wall.take(), spent - stage.take(), schedule.take(), text)
        if len(outputs) == batch and all(output.finish_reason is None for output in outputs):
            for row, value in zip(rows.values(), values, strict=True):
                row.append(value * 1e6)
    del engine._stage.run, engine.scheduler.schedule
    return {name: statistics.median(row[1:]) for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-B", "--batch", default="1,8,32")
    parser.add_argument("-n", "--n-tokens", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    args = parser.parse_args()
    path: Path = resolve(args.model)
    with load_model(path, n_threads=args.threads, n_ctx=512, kv_cache_memory=1 << 30) as model:
        scheduler = model.engine.scheduler
        print("batch  multi_step  stage_us  engine_us  schedule_us  text_us")
        for batch in map(int, args.batch.split(",")):
            found: dict[int, list[dict[str, float]]] = {1: [], 8: []}
            for _ in range(args.repetitions):
                for multi_step, each in found.items():
                    object.__setattr__(scheduler.config, "multi_step", multi_step)
                    each.append(measure(model, batch, args.n_tokens))
            for multi_step, each in found.items():
                cells = [statistics.median(row[name] for row in each) for name in each[0]]
                print(f"{batch:5}  {multi_step:10}  " + "  ".join(f"{value:9.0f}" for value in cells))


if __name__ == "__main__":
    main()
