"""`Background`: work beside the server, such as loading the model."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs `work` from now on, on a thread that does not keep the process alive."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failure = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()
