"""Runs the server: the socket answers at once, the model loads beside it, and a signal drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from pyinfer.server.background import Background
from pyinfer.server.service import Service

DRAIN_SECONDS = 30
_GRACE_SECONDS = 3  # for answers that the engine has ended to reach their clients
_INTERRUPTED = 130


class _DrainingServer(uvicorn.Server):
    """Ends on SIGINT or SIGTERM once running requests are answered; a second SIGINT ends the process at once."""

    def __init__(self, config: uvicorn.Config, service: Service, loading: Background) -> None:
        super().__init__(config)
        self._service = service
        self._loading = loading

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
        running = len(self.server_state.tasks)
        if running and not self.should_exit:
            text = f"\nfinishing {running} requests, {DRAIN_SECONDS} s at most; Ctrl-C again stops them\n"
            os.write(sys.stderr.fileno(), text.encode())
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        return self._loading.failure is not None or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Beside uvicorn's own, which waits for the connections: what still runs at the end is ended by the engine."""
        draining = asyncio.create_task(self._service.drain(DRAIN_SECONDS))
        await super().shutdown(sockets)
        draining.cancel()


def run_server(
    app: ASGIApp, service: Service, listener: socket.socket, loading: Background, *, access_log: bool = False
) -> None:
    """Serve until a signal comes or `loading` fails; its error is then raised."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=access_log,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=DRAIN_SECONDS + _GRACE_SECONDS,
    )
    if access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    _DrainingServer(config, service, loading).run(sockets=[listener])
    if loading.failure is not None:
        raise loading.failure
