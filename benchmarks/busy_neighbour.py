"""Decode with all cores while another process keeps one of them busy.

    python benchmarks/busy_neighbour.py --model smollm2 --seconds 60

A thread that the neighbour pushes off its core would hold every other thread at the next barrier. Runs with one thread and
with all of them take turns under the same load; the ratio should stay near 1 or above.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from machine_state import describe_machine

from pyinfer.runtime.hub import resolve
from pyinfer.runtime.threads import default_threads


def decode_rates(model: str, threads: int, n_gen: int, runs: int) -> list[float]:
    """Tokens per second of `runs` runs of n_gen tokens."""
    command = [sys.executable, "-m", "pyinfer", "bench", model, "-p", "0", "-n", str(n_gen), "-r", str(runs)]
    done = subprocess.run([*command, "-t", str(threads), "-o", "json"], capture_output=True, text=True, check=True)
    return [float(value) for result in json.loads(done.stdout) for value in result["samples_ts"]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode beside a busy process.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=60, help="about so long with each thread count")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = str(resolve(arguments.model))
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    rates: dict[int, list[float]] = {1: [], arguments.threads: []}
    try:
        rate = statistics.median(decode_rates(model, 1, 64, 2))
        runs = max(1, round(arguments.seconds / arguments.rounds * rate / 256))
        for number in range(arguments.rounds):
            for threads in sorted(rates, reverse=number % 2 == 1):
                rates[threads] += decode_rates(model, threads, 256, runs)
    finally:
        neighbour.kill()
        neighbour.wait()
    print(describe_machine())
    # tokens over time: a stall counts with its length, which a median of runs would hide
    mean = {threads: statistics.harmonic_mean(values) for threads, values in rates.items()}
    for threads, values in rates.items():
        print(f"-t {threads}: {mean[threads]:.1f} tokens/s over {len(values)} runs of 256 (least {min(values):.1f})")
    print(f"ratio {mean[arguments.threads] / mean[1]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
