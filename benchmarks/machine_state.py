"""What else happens on the machine while something is measured: read bandwidth, and CPUs that others use."""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from pyinfer.runtime.bandwidth import read_bandwidth
from pyinfer.runtime.cpu import cpu_name

_STAT = Path("/proc/stat")


def describe_machine() -> str:
    """CPU, logical CPUs and system, for a table's caption."""
    return f"{cpu_name()}, {os.cpu_count()} logical CPUs, {platform.system()} {platform.release().split('-')[0]}"


def bandwidth(n_threads: int) -> float:
    """GB/s that a plain read loop reaches now."""
    return read_bandwidth(n_threads)


@dataclass(frozen=True)
class CpuClock:
    """Moments of wall time and CPU time; a difference tells how busy others were."""

    wall: float
    total: float  # CPU seconds used by all processes; 0 where the system does not say
    ours: float  # by this process and its finished children

    @classmethod
    def now(cls) -> CpuClock:
        total = 0.0
        if _STAT.exists():
            ticks = [int(word) for word in _STAT.read_text().splitlines()[0].split()[1:9]]
            user, nice, system, _, _, irq, softirq, steal = ticks
            total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        ours = sum(
            usage.ru_utime + usage.ru_stime
            for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        )
        return cls(time.monotonic(), total, ours)

    def others_since(self, start: CpuClock) -> float:
        """CPUs that other processes, and the host, kept busy on average since `start`."""
        wall = self.wall - start.wall
        return max(0.0, (self.total - start.total) - (self.ours - start.ours)) / wall if wall > 0 else 0.0


def wait_until_idle(timeout: float, busy: float = 0.1) -> bool:
    """Wait until others use less than `busy` CPUs for a second; False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        start = CpuClock.now()
        time.sleep(1)
        if CpuClock.now().others_since(start) < busy:
            return True
        if time.monotonic() > deadline:
            return False
