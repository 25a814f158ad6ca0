"""When requests arrive."""

from __future__ import annotations

import math
import random


def arrival_times(n: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start for n requests: a Poisson process of `rate` a second, or all at 0 if it is infinite.

    As in vLLM's benchmark_serving the first one arrives at 0 and the gaps are exponential.
    """
    assert rate > 0
    if math.isinf(rate):
        return [0.0] * n
    rng = random.Random(seed)
    times = [0.0] * n
    for i in range(1, n):
        times[i] = times[i - 1] + rng.expovariate(rate)
    return times
