"""How long work tells what it is doing: one small interface, silent or in plain lines. The bar is the CLI's."""

from __future__ import annotations

import sys
from typing import Protocol, TextIO

from pyinfer.runtime.sizes import format_size


class Progress(Protocol):
    """A counted task in bytes, one at a time, and remarks beside it."""

    def begin(self, title: str, total: int | None) -> None:
        """Starts a task of `total` bytes (None: not known)."""

    def update(self, done: int) -> None:
        """So many bytes of the task are there; may be called often and may fall back after a failed part."""

    def say(self, text: str) -> None:
        """A remark of one line."""

    def end(self) -> None:
        """The task is over, done or not."""


class SilentProgress:
    """Tells nobody."""

    def begin(self, title: str, total: int | None) -> None: ...

    def update(self, done: int) -> None: ...

    def say(self, text: str) -> None: ...

    def end(self) -> None: ...


class LineProgress:
    """A few plain lines, fit for a log: the title, every tenth of the way (or every 100 MB), remarks."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._title = ""
        self._total: int | None = None
        self._next = 0

    def begin(self, title: str, total: int | None) -> None:
        self._title, self._total = title, total
        self._next = self._step()
        self.say(title if total is None else f"{title} ({format_size(total)})")

    def _step(self) -> int:
        return max(1, self._total // 10) if self._total else 100_000_000

    def update(self, done: int) -> None:
        if done < self._next:
            return
        self._next = (done // self._step() + 1) * self._step()
        if self._total is None:
            self.say(f"{self._title}: {format_size(done)}")
        elif done < self._total:
            self.say(f"{self._title}: {100 * done // self._total} % of {format_size(self._total)}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def end(self) -> None:
        self._title, self._total = "", None
