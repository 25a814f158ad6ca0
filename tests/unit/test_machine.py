"""Threads and memory that this process may use, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pyinfer.runtime import threads
from pyinfer.runtime.bandwidth import read_bandwidth
from pyinfer.runtime.memory import memory
from pyinfer.runtime.threads import cgroup_quota, cpu_limits, default_threads

pytestmark = [pytest.mark.unit, pytest.mark.skipif(sys.platform != "linux", reason="reads Linux trees")]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def topology(*siblings: str) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{text}\n" for i, text in enumerate(siblings)
    }


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


@pytest.mark.parametrize(
    ("siblings", "n_cores"),
    [
        (("0,2", "1,3", "0,2", "1,3"), 2),  # two cores of two hyperthreads
        (("0-1", "0-1", "2-3", "2-3"), 2),
        (("0", "1", "2", "3"), 4),
        (("0,4", "1,5", "2,6", "3,7"), 4),  # the siblings are not ours to use
        ((), 4),  # no topology: every CPU counts
    ],
)
def test_hyperthreads_share_a_core(allowed: None, tmp_path: Path, siblings: tuple[str, ...], n_cores: int) -> None:
    limits = cpu_limits(write(tmp_path, topology(*siblings)))
    assert (limits.n_allowed, limits.n_physical, limits.n_threads, limits.quota) == (4, n_cores, n_cores, None)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (  # the tightest of the group and those around it
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/cpu.max": "300000 100000",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/../../outside\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/1\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "garbage\n", "sys/fs/cgroup/cpu.max": "x y"}, None),
        ({}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cgroup_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "n_threads"), [("50000", 1), ("100000", 1), ("290000", 2), ("900000", 4)])
def test_quota_cuts_the_threads(allowed: None, tmp_path: Path, quota: str, n_threads: int) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000"})
    assert cpu_limits(tmp_path).n_threads == n_threads


def test_here() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))


def test_macos_counts_performance_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(threads, "_sysctl", {"hw.perflevel0.physicalcpu": 6, "hw.physicalcpu": 8}.get)
    assert cpu_limits().n_physical == 6
    monkeypatch.setattr(threads, "_sysctl", {"hw.physicalcpu": 8}.get)
    assert cpu_limits().n_physical == 8
    monkeypatch.setattr(threads, "_sysctl", lambda name: None)
    assert cpu_limits().n_physical == (os.cpu_count() or 1)


MEMINFO = {
    "proc/meminfo": "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  5000 kB\n",
    "proc/self/cgroup": "0::/a\n",
}


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8000 * 1024, 5000 * 1024),
        ({"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.current": "5"}, 8000 * 1024, 5000 * 1024),
        ({"sys/fs/cgroup/a/memory.max": "3000000", "sys/fs/cgroup/a/memory.current": "1000000"}, 3000000, 2000000),
        (
            {
                "sys/fs/cgroup/a/memory.max": "3000000",
                "sys/fs/cgroup/a/memory.current": "2900000",
                "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000\nfile 2\n",
            },
            3000000,
            600000,
        ),
        ({"sys/fs/cgroup/memory.max": "2000000", "sys/fs/cgroup/memory.current": "2500000"}, 2000000, 0),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    now = memory(write(tmp_path, MEMINFO | files))
    assert (now.total, now.available) == (total, available)


def test_memory_here_agrees_with_psutil() -> None:
    psutil = pytest.importorskip("psutil")
    now = memory()
    assert now.total <= psutil.virtual_memory().total
    assert now.available <= psutil.virtual_memory().total and now.available > 0


def test_bandwidth_is_a_rate() -> None:
    assert 0.1 < read_bandwidth(1) < 10_000
