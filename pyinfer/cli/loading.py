"""What loading a model shows on stderr: a line that changes on a terminal; elsewhere lines, if it takes long."""

from __future__ import annotations

import sys
import threading
import time

_LONG = 3.0  # seconds; a log need not know about less


class LoadingLine:
    """Called with what is being done and the share done, from any thread; `clear` takes the line away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_terminal = sys.stderr.isatty()
        self._shown = ""
        self._start = time.monotonic()

    def __call__(self, what: str, share: float) -> None:
        text = f"{what} {100 * share:3.0f} %" if self._is_terminal else what
        with self._lock:
            if text == self._shown or (not self._is_terminal and time.monotonic() - self._start < _LONG):
                return
            self._shown = text
            sys.stderr.write(f"\r\x1b[K{text}" if self._is_terminal else f"{text}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        with self._lock:
            if self._shown and self._is_terminal:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
            self._shown = ""
