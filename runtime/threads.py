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

from pyinfer.runtime.cgroup import cgroup_folders, read_text


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
        text = read_text(base / name)
        if text:
            return text
    return str(cpu)


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota from this process's cgroup up to the root of its hierarchy, in CPUs; None without one."""
    quotas = [_quota(version, folder) for version, folder in cgroup_folders("cpu", root)]
    return min((q for q in quotas if q is not None), default=None)


def _quota(version: int, folder: Path) -> float | None:
    if version == 2:
        quota, _, period = (read_text(folder / "cpu.max") or "").partition(" ")
    else:
        quota = read_text(folder / "cpu.cfs_quota_us") or ""
        period = read_text(folder / "cpu.cfs_period_us") or ""
    try:
        q, p = int(quota), int(period)
    except ValueError:
        return None  # 'max', or not there
    return q / p if q > 0 and p > 0 else None


def _sysctl(name: str) -> int | None:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
