"""From the start of the process to the first token, and the most memory it held: pyinfer and llama.cpp in turn.

    python benchmarks/build_peer.py
    python benchmarks/first_token.py --models smollm2 qwen2.5-coder-1.5b --rounds 5

Both answer one chat message and exit: `pyinfer run MODEL PROMPT` and `llama-completion -st`. The clock runs from fork to
the first byte of the answer on stdout. One start of each beforehand warms the page cache and ours of kernels. Memory is
the peak resident set of the process (mapped pages of the file count while they are resident).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from build_peer import binary_folder
from machine_state import CpuClock, describe_machine, wait_until_idle

from pyinfer.runtime.hub import resolve

PROMPT = "Write one line about the sea."
N_CTX, N_GEN = 4096, 8


@dataclass
class Starts:
    """All starts of one program on one model."""

    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)  # 10^6 bytes


def start(command: list[str]) -> tuple[float, float]:
    """Seconds to the first byte on stdout, and the peak resident set in MB; RuntimeError if there is no answer."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    seconds = time.perf_counter() - begun
    while os.read(process.stdout.fileno(), 1 << 16):
        pass
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not first or process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} and {'an' if first else 'no'} answer")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def commands(peer: Path, path: Path, threads: int) -> dict[str, list[str]]:
    """The two sides' commands."""
    shared = ["-t", str(threads), "-c", str(N_CTX), "-n", str(N_GEN)]
    ours = [sys.executable, "-m", "pyinfer", "run", str(path), PROMPT, *shared]
    theirs = [str(peer), "-m", str(path), "-p", PROMPT, "-st", "--no-display-prompt", "--temp", "0", *shared]
    return {"pyinfer": ours, "llama.cpp": theirs}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time to the first token from the start of the process.")
    parser.add_argument("--models", nargs="+", default=["smollm2", "qwen2.5-coder-1.5b"], help="names or paths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", type=Path, default=binary_folder(), help="folder with llama.cpp's programs")
    parser.add_argument("--wait-idle", type=float, default=0, metavar="SECONDS")
    arguments = parser.parse_args()
    peer = arguments.peer / "llama-completion"
    if not peer.is_file():
        print(f"first_token: {peer} is not there; run benchmarks/build_peer.py or name it in --peer", file=sys.stderr)
        return 1
    print(f"{describe_machine()}; {arguments.rounds} rounds, {arguments.threads} threads, context {N_CTX}\n")
    print("| model | file MB | first token s | llama.cpp s | difference | peak MB | llama.cpp MB | others' CPUs |")
    print("|---|" + "---:|" * 7)
    for name in arguments.models:
        path = resolve(name)
        sides = commands(peer, path, arguments.threads)
        starts = {side: Starts() for side in sides}
        for command in sides.values():
            start(command)
        wait_until_idle(arguments.wait_idle)
        clock = CpuClock.now()
        for number in range(arguments.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                seconds, peak = start(sides[side])
                starts[side].seconds.append(seconds)
                starts[side].peak_mb.append(peak)
        others = CpuClock.now().others_since(clock)
        ours, theirs = starts["pyinfer"], starts["llama.cpp"]
        ours_s, theirs_s = statistics.median(ours.seconds), statistics.median(theirs.seconds)
        print(
            f"| {name} | {path.stat().st_size / 1e6:.0f} | {ours_s:.2f} | {theirs_s:.2f} | {ours_s - theirs_s:+.2f} "
            f"| {max(ours.peak_mb):.0f} | {max(theirs.peak_mb):.0f} | {others:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
