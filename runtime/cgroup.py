"""The control groups that this process lives in (Linux): where a container's CPU and memory limits are written.

Version 2 has one tree, version 1 one per controller; a machine may mount both. See the kernel's cgroup-v1 and cgroup-v2
documents. On other systems there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_V2_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's group and every group around it, for a controller such as 'cpu' or 'memory'.

    `root` stands for `/` and exists for tests.
    """
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) != 3:
            continue
        _, controllers, group = fields
        if not controllers:
            version, mounts = 2, _V2_MOUNTS
        elif controller in controllers.split(","):
            version, mounts = 1, (f"sys/fs/cgroup/{controller}", f"sys/fs/cgroup/{controllers}")
        else:
            continue
        # In a container the path in /proc may lie outside the mounted tree: the mount's root then holds the limit.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                folder = root.joinpath(mount, *parts[:depth])
                if folder.is_dir():
                    yield version, folder


def read_text(path: Path) -> str | None:
    """The file's text without surrounding space; None if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_int(path: Path) -> int | None:
    """The file's number; None if there is none ('max')."""
    text = read_text(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None
