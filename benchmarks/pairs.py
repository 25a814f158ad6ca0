"""Two commands that do the same work, run in turn: samples of both sides, and what the machine did meanwhile."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from machine_state import CpuClock, bandwidth, wait_until_idle

FAST_READ = 50.0  # GB/s of two threads: memory on some machines has a fast and a slow regime, minutes long


@dataclass(frozen=True)
class Round:
    """One run of each side, one right after the other."""

    ours: float  # tokens a second
    peers: float
    reads: tuple[float, float]  # GB/s of the read loop before and after
    others: float  # CPUs that other processes took

    @property
    def is_fast(self) -> bool:
        return min(self.reads) >= FAST_READ


@dataclass
class Row:
    """All rounds of one test on one model."""

    model: str
    threads: int
    test: str
    goal: float
    slow_goal: float  # where no round ran in the fast regime of memory
    file_bytes: int | None = None  # of the file, where a token reads all of it
    rounds: list[Round] = field(default_factory=list)

    @property
    def counted(self) -> list[Round]:
        """The rounds in the fast regime, or all where there is none."""
        return [r for r in self.rounds if r.is_fast] or self.rounds

    @property
    def is_slow(self) -> bool:
        return not any(r.is_fast for r in self.rounds)

    @property
    def wanted(self) -> float:
        return self.slow_goal if self.is_slow else self.goal

    def median(self, what: str) -> float:
        return float(statistics.median(getattr(r, what) for r in self.counted))

    @property
    def ratio(self) -> float:
        return self.median("ours") / self.median("peers")

    @property
    def read(self) -> float:
        return statistics.median(sum(r.reads) / 2 for r in self.counted)

    @property
    def read_share(self) -> float | None:
        """Bytes of the file that our decode reads a second, over the read loop's."""
        return None if self.file_bytes is None else self.median("ours") * self.file_bytes / 1e9 / self.read

    def cells(self) -> list[str]:
        share = self.read_share
        return [
            self.model, str(self.threads), self.test, _spread([r.ours for r in self.counted]),
            _spread([r.peers for r in self.counted]), f"{self.ratio:.2f}", f"{self.wanted:.2f}", f"{self.read:.0f}",
            "" if share is None else f"{share:.2f}", f"{max(r.others for r in self.counted):.1f}",
        ]  # fmt: skip


HEADER = (
    "model", "threads", "test", "pyinfer t/s", "llama.cpp t/s", "ratio", "goal", "read GB/s", "file over read",
    "others' CPUs",
)  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.1f}" if len(values) == 1 else f"{middle:.1f} ({min(values):.1f}..{max(values):.1f})"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


def run_round(row: Row, ours: Callable[[], float], peers: Callable[[], float], idle: float) -> None:
    """Adds a round to `row`; the side that begins changes from round to round."""
    if idle:
        wait_until_idle(idle)
    before, clock = bandwidth(row.threads), CpuClock.now()
    if len(row.rounds) % 2 == 0:
        our_speed, peers_speed = ours(), peers()
    else:
        peers_speed, our_speed = peers(), ours()
    others = CpuClock.now().others_since(clock)
    row.rounds.append(Round(our_speed, peers_speed, (before, bandwidth(row.threads)), others))


def run_json(command: list[str]) -> list[dict[str, Any]]:
    """What a bench program prints as JSON or as JSON lines; RuntimeError with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout.strip()
    try:
        found = json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines() if x[:1] == "{"]
    except ValueError:
        found = []
    if done.returncode != 0 or not found:
        words = "\n".join(done.stderr.strip().splitlines()[-10:])
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{words}")
    results: list[dict[str, Any]] = found
    return results
