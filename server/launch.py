"""Runs the server: the socket answers at once, the model loads beside it, and a signal drains it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from pyinfer.errors import ConfigError

DRAIN_SECONDS = 30
_INTERRUPTED = 130


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigError` naming the address and the remedy."""
    where = f"{host}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is not an address of this machine: {error}", param="host") from error
    try:
        return socket.create_server(address[:2], family=family, backlog=2048)
    except PermissionError as error:
        raise ConfigError(f"no permission to listen on {where}; use a port over 1023", param="port") from error
    except OSError as error:
        reason = "the address is in use" if "in use" in str(error) else (error.strerror or str(error))
        raise ConfigError(
            f"cannot listen on {where}: {reason}; choose another with --port or --host", param="port"
        ) from error


def url_of(listener: socket.socket) -> str:
    """The address that a browser on this machine can open."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _DrainingServer(uvicorn.Server):
    """Ends on SIGINT or SIGTERM once running requests are answered; a second SIGINT ends the process at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own sends the signal to the process again, which would end it with an error."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            os._exit(_INTERRUPTED)
        if not self.should_exit:
            running = len(self.server_state.tasks)
            if running:
                text = f"\nfinishing {running} requests, {DRAIN_SECONDS} s at most; Ctrl-C again stops them\n"
                os.write(sys.stderr.fileno(), text.encode())
        self.should_exit = True


def run_server(app: ASGIApp, listener: socket.socket, load: Callable[[], None], *, access_log: bool = False) -> bool:
    """Serve until a signal comes. `load` runs on a thread of its own; if it raises, the server ends and that is raised.

    True if `load` has returned; otherwise its thread still runs.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=access_log,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _DrainingServer(config)
    failures: list[BaseException] = []

    def load_or_stop() -> None:
        try:
            load()
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    loader = threading.Thread(target=load_or_stop, name="pyinfer-loader", daemon=True)
    loader.start()
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    return not loader.is_alive()
