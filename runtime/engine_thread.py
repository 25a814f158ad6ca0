"""`EngineThread`: an `EngineClient` whose engine runs on a thread of this process.

An engine without work waits on a condition and takes no CPU.
"""

from __future__ import annotations

import logging
import threading

from pyinfer.runtime.engine import Engine
from pyinfer.runtime.engine_client import STOPPED, EngineClient
from pyinfer.runtime.engine_loop import turn
from pyinfer.runtime.engine_messages import Message
from pyinfer.runtime.outputs import EngineStats
from pyinfer.runtime.request_limits import RequestLimits

_log = logging.getLogger(__name__)


class EngineThread(EngineClient):
    """From now on nobody else may step the engine; `close` leaves it open."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._inbox: list[Message] = []
        self._thread = threading.Thread(target=self._run, name="pyinfer-engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> RequestLimits:
        return self._engine.limits

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        with self._condition:
            self._failure = self._failure or STOPPED
            self._condition.notify()
        self._thread.join()

    def _send(self, message: Message) -> None:
        self._inbox.append(message)
        self._condition.notify()

    def _run(self) -> None:
        try:
            while (messages := self._next_messages()) is not None:
                report = turn(self._engine, messages)
                self._deliver(report.outputs)
                if self.observer is not None:
                    self.observer.stepped(report)
        except Exception:
            _log.exception("the engine's thread ended")
        finally:
            self._end_all()

    def _next_messages(self) -> list[Message] | None:
        """What arrived since the last step; waits if there is nothing to do; None when closed."""
        with self._condition:
            while not self._inbox and self._failure is None and not self._engine.has_work:
                self._condition.wait()
            if self._failure is not None:
                return None
            messages, self._inbox = self._inbox, []
            return messages

    def _end_all(self) -> None:
        """Tell every listener, and leave the engine empty."""
        for request_id in self._fail_all(STOPPED):
            try:
                self._engine.abort(request_id)
            except Exception:
                _log.exception("a request could not be ended")
