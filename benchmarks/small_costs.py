"""Costs that should not be felt: greedy sampling, a tokenizer's start, compiling, an idle server.

    python benchmarks/small_costs.py --models smollm2 qwen2.5-coder-1.5b gemma3-270m --idle-seconds 20

Starts are of new processes, from fork to exit, with a model's page cache warm. "Nothing compiled" is a start with an empty
cache of kernels. The idle server has one model and no request; its CPU time is that of all its processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine_state import describe_machine
from serving_process import own_server, running

from pyinfer.paths import home
from pyinfer.runtime.hub import resolve
from pyinfer.runtime.sampler import SequenceSampler, sample
from pyinfer.runtime.sampling_params import SamplingParams

N_VOCAB = 262_144
TOKENIZER = "import sys; from pyinfer.runtime.tokenizer import load_tokenizer; import time; t = time.perf_counter(); "
TOKENIZER += "load_tokenizer(sys.argv[1]); print(time.perf_counter() - t)"


def greedy_seconds(runs: int) -> float:
    """Median of one token's choice out of N_VOCAB logits that the cache does not hold."""
    logits = np.random.default_rng(0).standard_normal((64, N_VOCAB), np.float32)
    sampler = SequenceSampler(SamplingParams(temperature=0), seed=0, index=0, n_prompt=0)
    times = []
    for i in range(runs):
        row = logits[i % 64 : i % 64 + 1]
        start = time.perf_counter()
        sample(row, [0], [sampler], [[]])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tokenizer_seconds(path: Path, runs: int) -> float:
    """Median over processes of opening the file and making its tokenizer, imports not counted."""
    command = [sys.executable, "-c", TOKENIZER, str(path)]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(runs + 1)]
    return statistics.median(map(float, outputs[1:]))


def start_seconds(path: Path, folder: str) -> float:
    """A process that decodes two tokens, with PYINFER_HOME in `folder`."""
    command = [sys.executable, "-m", "pyinfer", "bench", str(path), "-p", "0", "-n", "1", "-r", "1"]
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYINFER_HOME": folder})
    return time.perf_counter() - start


def tree_cpu_seconds(root: int) -> float:
    """CPU time of a process and all below it."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        used[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def idle_share(path: Path, seconds: float) -> float:
    """CPUs that an idle server uses."""
    with running(own_server(os.cpu_count() or 1), path, 4096) as server:
        time.sleep(3)
        before = tree_cpu_seconds(server.pid)
        time.sleep(seconds)
        return (tree_cpu_seconds(server.pid) - before) / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description="Costs that should not be felt.")
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--idle-seconds", type=float, default=20)
    arguments = parser.parse_args()
    print(f"{describe_machine()}; caches in {home()}\n")
    print(f"greedy over {N_VOCAB:,} logits: {1e6 * greedy_seconds(200):.0f} us")
    paths = [resolve(name) for name in arguments.models]
    for path in paths:
        print(f"tokenizer of {path.stem}: {tokenizer_seconds(path, arguments.runs):.2f} s")
        with tempfile.TemporaryDirectory() as folder:
            first, later = start_seconds(path, folder), start_seconds(path, folder)
        print(f"a process with {path.stem}: {first:.2f} s with nothing compiled, {later:.2f} s then", flush=True)
    print(f"idle server: {100 * idle_share(paths[0], arguments.idle_seconds):.2f} % of a CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
