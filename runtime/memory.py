"""How much memory this machine has and how much of it this process may still take, in bytes."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pyinfer.runtime.cgroup import cgroup_folders, read_int, read_text


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM; a container's limit counts where it is smaller."""

    total: int
    available: int  # without swapping; caches that the system can drop count as available


def memory(root: Path = Path("/")) -> Memory:
    """Measured now. `root` stands for `/` and exists for tests."""
    if sys.platform == "darwin":
        return _darwin()
    if sys.platform == "win32":
        return _windows()
    return _linux(root)


def _linux(root: Path) -> Memory:
    fields = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        match = re.match(r"(\w+):\s+(\d+) kB", line)
        if match:
            fields[match[1]] = 1024 * int(match[2])
    total = fields.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = fields.get("MemAvailable", fields.get("MemFree", total))
    for version, folder in cgroup_folders("memory", root):
        limit = read_int(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        used = read_int(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if limit is not None and used is not None and limit < total:
            # The group's page cache counts as used but is given up first.
            reclaimable = _stat(folder, "inactive_file" if version == 2 else "total_inactive_file")
            total, available = limit, min(available, max(0, limit - used + reclaimable))
    return Memory(total, available)


def _stat(folder: Path, key: str) -> int:
    match = re.search(rf"^{key} (\d+)$", read_text(folder / "memory.stat") or "", re.MULTILINE)
    return int(match[1]) if match else 0


def _darwin() -> Memory:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        text = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Memory(total, total // 2)
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.MULTILINE)
    return Memory(total, min(total, sum(map(int, pages)) * (int(page[1]) if page else 4096)))


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "tp", "ap", "tv", "av", "ave")),
    )


def _windows() -> Memory:
    status = _MemoryStatus()
    status.length = ctypes.sizeof(status)
    ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return Memory(int(status.total), int(status.available))
