"""`pyinfer quantize` and llama-quantize in turn on the same file: seconds from the start of the process to its end.

python benchmarks/quantize_vs_llama.py --peer BIN --source model-f16.gguf [--types Q8_0 Q4_0 Q4_K_M] [--rounds 7]

Both write to `--scratch` (a folder in memory shows the programs, a disk shows the disk too). The first run of ours, which may
compile, is not counted. CPU seconds are user and system time of the process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine_state import describe_machine
from pairs import Row, run_round

HEADER = (
    "source", "type", "threads", "pyinfer s", "llama-quantize s", "speed ratio", "pyinfer CPU s",
    "llama-quantize CPU s", "others' CPUs",
)  # fmt: skip


class Timed:
    """A command; every call runs it and gives files a second."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.cpu: list[float] = []

    def __call__(self) -> float:
        before, start = _children(), time.perf_counter()
        done = subprocess.run(self.command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - start
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(self.command)}\nended with {done.returncode}:\n{done.stderr[-1000:]}")
        self.cpu.append(_children() - before)
        return 1 / wall


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _seconds(speeds: list[float]) -> str:
    values = [1 / speed for speed in speeds]
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def measure(source: Path, kind: str, arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """The cells of one row."""
    files = [str(source), str(scratch / "out.gguf"), kind]
    threads = str(arguments.threads)
    ours = Timed([sys.executable, "-m", "pyinfer", "quantize", *files, "-t", threads])
    peers = Timed([str(arguments.peer / "llama-quantize"), *files, threads])
    ours()
    ours.cpu.clear()
    row = Row(source.stem, arguments.threads, kind, 1.0, 1.0)
    for _ in range(arguments.rounds):
        run_round(row, ours, peers, arguments.wait_idle)

    our_speeds, peers_speeds = [r.ours for r in row.rounds], [r.peers for r in row.rounds]
    return [
        row.model, kind, threads, _seconds(our_speeds), _seconds(peers_speeds),
        f"{statistics.median(our_speeds) / statistics.median(peers_speeds):.2f}",
        f"{statistics.median(ours.cpu):.2f}", f"{statistics.median(peers.cpu):.2f}",
        f"{max(r.others for r in row.rounds):.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="folder with llama-quantize")
    parser.add_argument("--source", type=Path, required=True, nargs="+")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_0", "Q4_K_M"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scratch", type=Path, help="folder for the output")
    parser.add_argument("--wait-idle", type=float, default=0, metavar="SECONDS", help="before a pair, at most so long")
    arguments = parser.parse_args()
    print(describe_machine())
    print("| " + " | ".join(HEADER) + " |\n|---|---|" + "---:|" * (len(HEADER) - 2))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for source in arguments.source:
            for kind in arguments.types:
                print("| " + " | ".join(measure(source, kind, arguments, Path(scratch))) + " |", flush=True)


if __name__ == "__main__":
    main()
