"""Running a package manager as a child process: watched while it downloads, stopped when the caller is."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_SECONDS = 0.1


def run_downloader(
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    watched: Sequence[Path],
    on_bytes: Callable[[int], None],
) -> int:
    """Runs `command` with its output in `log`; returns its exit code.

    `on_bytes` is called with the size of the largest file in the `watched` folders: that is the package, under whatever
    name this version of the package manager gives it.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=log.parent
        )
        try:
            while True:
                try:
                    return process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    on_bytes(max(map(_largest_file, watched), default=0))
        finally:
            _stop(process)


def log_lines(log: Path) -> list[str]:
    """What the child wrote, without empty lines."""
    return [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _largest_file(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest
