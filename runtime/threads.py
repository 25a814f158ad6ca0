"""How many threads to use: physical cores that this process may run on.

Counted from what the kernel says: the affinity mask, the SMT siblings under /sys (Linux), and the CPU quota of the
cgroup (v2 `cpu.max`, v1 `cpu.cfs_quota_us`/`cpu.cfs_period_us`) of this process and every parent of it. Elsewhere: the
physical core count that the system reports, or all logical CPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuLimits:
    """What bounds the thread count of this process."""

    n_logical: int  # logical CPUs of the machine
    n_allowed: int  # logical CPUs in this process's affinity mask
    n_physical: int  # physical cores among the allowed ones
    quota: float | None  # CPUs that the cgroup grants, None without a limit
    n_threads: int  # the default: physical cores, cut to the quota, at least 1


def default_threads() -> int:
    """Threads used when the user names none."""
    return cpu_limits().n_threads


def cpu_limits(root: Path = Path("/")) -> CpuLimits:
    """Reads the limits anew. `root` stands for `/` and exists for tests of /sys and /proc trees."""
    allowed = _allowed_cpus()
    n_physical = _physical_cores(allowed, root)
    quota = cgroup_quota(root)
    n_threads = n_physical if quota is None else min(n_physical, int(quota))
    return CpuLimits(os.cpu_count() or 1, len(allowed), n_physical, quota, max(1, n_threads))


def _allowed_cpus() -> frozenset[int]:
    if sys.platform != "win32" and sys.platform != "darwin":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _physical_cores(allowed: frozenset[int], root: Path) -> int:
    if sys.platform == "darwin":
        n = _sysctl("hw.perflevel0.physicalcpu") or _sysctl(
            "hw.physicalcpu"
        )  # efficiency cores would hold every step up
        return n or len(allowed)
    cores = {_core_of(cpu, root) for cpu in allowed}
    return len(cores)


def _core_of(cpu: int, root: Path) -> str:
    """The sibling list names the physical core: all its hyperthreads share it."""
    base = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        text = _read(base / name)
        if text:
            return text
    return str(cpu)


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota from this process's cgroup up to the root of its hierarchy, in CPUs; None without one."""
    quotas: list[float] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mounts, read_quota = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read_quota = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"), _quota_v1
        else:
            continue
        # In a container the path in /proc may lie outside the mounted tree: the mount's root then holds the limit.
        parts = [p for p in group.split("/") if p and p != ".."]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                quota = read_quota(root.joinpath(mount, *parts[:depth]))
                if quota is not None:
                    quotas.append(quota)
    return min(quotas) if quotas else None


def _quota_v2(folder: Path) -> float | None:
    fields = (_read(folder / "cpu.max") or "").split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return _ratio(fields[0], fields[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return _ratio(quota, period) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    try:
        q, p = int(quota), int(period)
    except ValueError:
        return None
    return q / p if q > 0 and p > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _sysctl(name: str) -> int | None:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
