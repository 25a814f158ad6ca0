"""`EngineChild`: the operating system's side of an engine's process. Only the standard library, so that it starts at
once, before its parent has imported anything heavy."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from typing import NamedTuple

_MODULE = "pyinfer.runtime.engine_main"


class ChildEnd(NamedTuple):
    how: str  # for people, like "signal 9 (SIGKILL)"
    is_foreign: bool  # killed by somebody else, or for the machine's lack of memory: no request is to blame


class EngineChild:
    """Started when built; ends by itself when this process ends, however that happens."""

    def __init__(self, log_level: str = "warning") -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        options: dict[str, object] = {}
        if os.name == "nt":
            options["creationflags"] = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        else:
            options["start_new_session"] = True  # a terminal's Ctrl-C is for the parent alone
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, log_level],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            **options,  # type: ignore[call-overload]
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Becomes readable when the process ends; for a poller (not on Windows, where only sockets can be polled)."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def connect(self, address: bytes) -> None:
        """Tell it where to connect to: one line."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # has died already, which its owner will notice
            self._process.stdin.write(address + b"\n")

    def has_ended(self) -> bool:
        """True also while it is being buried: its end of the pipe is closed, but it cannot be waited for yet."""
        if self._process.poll() is not None:
            return True
        if os.name == "nt" or not select.select([self], [], [], 0)[0]:
            return False
        return os.read(self.fileno(), 4096) == b""

    def end(self) -> ChildEnd:
        """Waits for it."""
        code = self._process.wait()
        if code >= 0:
            return ChildEnd(f"exit code {code}", is_foreign=False)
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "?"
        return ChildEnd(f"signal {-code} ({name})", is_foreign=name == "SIGKILL")

    def wait(self, seconds: float) -> bool:
        """True if it ended within that time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it now and wait for that."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill it if it still runs, and close the pipes."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
