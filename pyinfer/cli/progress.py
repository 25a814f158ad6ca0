"""The progress bar of a pull: rich on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pyinfer.runtime.progress import LineProgress, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


def terminal_progress() -> Progress:
    """The progress that fits where stderr goes."""
    return BarProgress() if sys.stderr.isatty() else LineProgress(sys.stderr)


class BarProgress:
    """A bar with bytes, rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def begin(self, title: str, total: int | None) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = RichProgress(
            *(TextColumn(c, markup=False) if isinstance(c, str) else c for c in columns), console=self._console
        )
        self._bar.start()
        self._bar.add_task(title, total=total)

    def update(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def say(self, text: str) -> None:
        (self._bar.console if self._bar else self._console).print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
