"""pyinfer against llama.cpp on the same file, in turn, in one run.

    python benchmarks/build_peer.py
    python benchmarks/versus_llamacpp.py --models smollm2 gemma3-270m --threads 1 2 --rounds 3

Memory bandwidth and other processes move both sides' figures from minute to minute, so only a ratio from one run
counts: each round runs `pyinfer bench` and `llama-bench` one right after the other, with a read loop before the pair,
and the next round starts with the other side. The table gives medians over all samples of all rounds (least and most
in brackets), the ratio of the medians, the read bandwidth and the CPUs that other processes took meanwhile. Above 0.1
of those the figures are those of a busy machine, which the sides bear differently.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_peer import binary_folder
from machine_state import CpuClock, bandwidth, describe_machine, wait_until_idle

from pyinfer.errors import PyinferError
from pyinfer.runtime.hub import resolve

DEFAULT_MODELS = ("smollm2", "gemma3-270m", "qwen2.5-coder-1.5b")


@dataclass
class Row:
    """All samples of one model, thread count and test, in tokens a second."""

    model: str
    threads: int
    test: str
    ours: list[float] = field(default_factory=list)
    peers: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)  # GB/s
    others: list[float] = field(default_factory=list)  # CPUs

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.peers)

    def cells(self) -> list[str]:
        return [
            self.model,
            str(self.threads),
            self.test,
            _spread(self.ours, 1),
            _spread(self.peers, 1),
            f"{self.ratio:.2f}",
            _spread(self.bandwidths, 0),
            _spread(self.others, 1),
        ]


HEADER = ("model", "threads", "test", "pyinfer t/s", "llama.cpp t/s", "ratio", "read GB/s", "others' CPUs")


def _spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def run_json(command: list[str]) -> list[dict[str, Any]]:
    """What a bench program prints as JSON; RuntimeError with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = "\n".join(done.stderr.strip().splitlines()[-10:])
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{words}")
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


class Versus:
    """The two programs and what they are asked to run."""

    def __init__(self, peer: Path, n_prompt: int, n_gen: int, samples: int, idle_timeout: float) -> None:
        self.peer, self.idle_timeout = peer, idle_timeout
        self.options = ["-p", str(n_prompt), "-n", str(n_gen), "-r", str(samples), "-o", "json"]

    def measure(self, name: str, path: Path, threads: int, rounds: int) -> list[Row]:
        rows: dict[str, Row] = {}
        ours = [sys.executable, "-m", "pyinfer", "bench", str(path), "-t", str(threads), *self.options]
        peers = [str(self.peer), "-m", str(path), "-t", str(threads), *self.options]
        for number in range(rounds):
            if self.idle_timeout:
                wait_until_idle(self.idle_timeout)
            read = bandwidth(threads)
            start = CpuClock.now()
            pair = (("ours", ours), ("peers", peers))
            for side, command in pair if number % 2 == 0 else reversed(pair):
                for result in run_json(command):
                    test = f"pp{result['n_prompt']}" if result["n_prompt"] else f"tg{result['n_gen']}"
                    row = rows.setdefault(test, Row(name, threads, test))
                    getattr(row, side).extend(result["samples_ts"])
            others = CpuClock.now().others_since(start)
            for row in rows.values():
                row.bandwidths.append(read)
                row.others.append(others)
            done = ", ".join(f"{row.test} {row.ratio:.2f}" for row in rows.values())
            print(
                f"{name}, {threads} threads, round {number + 1} of {rounds}: ratio {done}", file=sys.stderr, flush=True
            )
        return list(rows.values())


def print_table(rows: Sequence[Row]) -> None:
    print("| " + " | ".join(HEADER) + " |")
    print("|---|" + "---:|" * (len(HEADER) - 1))
    for row in rows:
        print("| " + " | ".join(row.cells()) + " |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="pyinfer and llama.cpp in turn on the same files.")
    parser.add_argument(
        "--models", nargs="+", default=list(DEFAULT_MODELS), help="names or paths (default: %(default)s)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--samples", type=int, default=2, help="samples of a test in a run (default: 2)")
    parser.add_argument("--n-prompt", type=int, default=512, help="prompt tokens; 0 leaves the test out (default: 512)")
    parser.add_argument("--n-gen", type=int, default=128, help="generated tokens; 0 leaves the test out (default: 128)")
    parser.add_argument("--peer", type=Path, default=binary_folder(), help="llama-bench or its folder")
    parser.add_argument("--wait-idle", type=float, default=0, metavar="SECONDS", help="before a pair, at most so long")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    peer: Path = arguments.peer / "llama-bench" if arguments.peer.is_dir() else arguments.peer
    if not peer.is_file():
        print(
            f"versus_llamacpp: {peer} is not there; run benchmarks/build_peer.py or name it in --peer", file=sys.stderr
        )
        return 1
    versus = Versus(peer, arguments.n_prompt, arguments.n_gen, arguments.samples, arguments.wait_idle)
    rows: list[Row] = []
    try:
        for name in arguments.models:
            path = resolve(name)
            for threads in arguments.threads:
                rows += versus.measure(Path(name).stem if "/" in name else name, path, threads, arguments.rounds)
    except (PyinferError, RuntimeError) as error:
        print(f"versus_llamacpp: {error}", file=sys.stderr)
        return 1
    print(f"{describe_machine()}; {arguments.rounds} rounds of {arguments.samples} samples\n")
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
