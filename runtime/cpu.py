"""What this machine's processor is called."""

from __future__ import annotations

import platform
from pathlib import Path

from pyinfer.runtime.cgroup import read_text


def cpu_name() -> str:
    """The marketing name where the system knows one ('AMD EPYC 9354'), else the architecture."""
    for line in (read_text(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
