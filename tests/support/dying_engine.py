"""An engine's process that dies, or hangs, at a chosen point of its work: kills that do not race with the work.

Run instead of `pyinfer.runtime.engine_main`; what it is to do stands in an environment variable.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pyinfer.runtime import engine_child, engine_loop, engine_main
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.engine_messages import AddRequest, Message, StepReport

if TYPE_CHECKING:
    import pytest

_VARIABLE = "DYING_ENGINE_PLAN"
_MORE_TURNS = 3  # that may pass until a kill arrives
HANG = 0  # instead of a signal's number
HANG_WITH_LOCK = -1  # a native call that never gives the interpreter's lock back


class Death(msgspec.Struct):
    n_tokens: int  # the engine works until it has made so many
    signal: int = int(getattr(signal, "SIGKILL", signal.SIGTERM))
    delay: float = 0.0  # seconds from then to the signal, in which it goes on for a few turns at most


class Plan(msgspec.Struct):
    folder: str  # has a file for each life so far; beside it a file ending in ".hung" once one hangs
    deaths: list[Death]  # of the first lives; the one after them goes on living
    n_requests: int = 1  # the first life begins its work when it has so many


def deadly(monkeypatch: pytest.MonkeyPatch, folder: Path, deaths: Sequence[Death], n_requests: int = 1) -> list[str]:
    """Engines started from now on follow this plan; returns the `program` that serves with such an engine."""
    folder.mkdir()
    monkeypatch.setenv(_VARIABLE, msgspec.json.encode(Plan(str(folder), list(deaths), n_requests)).decode())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(engine_child, "_MODULE", "dying_engine")
    code = (
        "import sys, pyinfer.runtime.engine_child as child; child._MODULE = 'dying_engine'\n"
        "from pyinfer.cli.entry import run; sys.exit(run(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code]


class _Doomed:
    """Stands in for `engine_loop.turn`."""

    def __init__(self, plan: Plan) -> None:
        life = len(os.listdir(plan.folder))
        Path(plan.folder, str(life)).touch()
        self._turn = engine_loop.turn
        self._n_awaited = plan.n_requests if life == 0 else 1
        self._death = plan.deaths[life] if life < len(plan.deaths) else None
        self._sign_of_hanging = Path(plan.folder + ".hung")
        self._held: list[Message] = []
        self._turns_left = -1  # not dying yet

    def __call__(self, engine: Engine, messages: Sequence[Message]) -> StepReport:
        self._held += messages
        if sum(isinstance(message, AddRequest) for message in self._held) < self._n_awaited:
            return self._turn(engine, [])
        self._n_awaited = 0
        messages, self._held = self._held, []
        if self._death is not None and (engine.has_work or messages):
            self._approach(self._death, engine.stats().generation_tokens)
        return self._turn(engine, messages)

    def _approach(self, death: Death, n_tokens: int) -> None:
        if self._turns_left > 0:
            self._turns_left -= 1
        elif self._turns_left == 0:
            time.sleep(600)
        elif n_tokens >= death.n_tokens and death.signal <= 0:
            self._sign_of_hanging.touch()
            if death.signal == HANG_WITH_LOCK:
                ctypes.PyDLL(None).sleep(600)
            time.sleep(600)
        elif n_tokens >= death.n_tokens:
            self._turns_left = _MORE_TURNS if death.delay else 0
            threading.Thread(target=_die, args=(death,)).start()
            if not death.delay:
                time.sleep(600)


def _die(death: Death) -> None:
    time.sleep(death.delay)
    os.kill(os.getpid(), death.signal)


if __name__ == "__main__":
    engine_loop.turn = _Doomed(msgspec.json.decode(os.environ[_VARIABLE], type=Plan))  # type: ignore[assignment]
    sys.exit(engine_main.main())
