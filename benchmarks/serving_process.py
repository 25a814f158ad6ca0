"""A server under test: started on a free port of the loopback address, ended by its process id."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 300.0  # a large model may be read and repacked first
_STOP_SECONDS = 30.0


class ServerError(Exception):
    """The server did not start, or died; says what it printed last."""


@dataclass(frozen=True)
class ServerKind:
    """A side of the comparison: how to start it for a model, at a port, with so many tokens for each client."""

    name: str
    command: Callable[[Path, int, int], list[str]]


def own_server(threads: int) -> ServerKind:
    """`pyinfer serve` with its defaults."""

    def command(model: Path, port: int, n_ctx: int) -> list[str]:
        return [sys.executable, "-m", "pyinfer", "serve", str(model), "--port", str(port), "-t", str(threads)]

    return ServerKind("pyinfer", command)


def llama_server(program: Path, threads: int, slots: int) -> ServerKind:
    """llama-server with its defaults; its context is divided among the slots, so each gets as much as is needed."""

    def command(model: Path, port: int, n_ctx: int) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-np", str(slots)]
        return [str(program), "-m", str(model), *options, "-c", str(slots * n_ctx), "--no-webui"]

    return ServerKind("llama-server", command)


class RunningServer(str):
    """The URL of a server that is ready, and the process that was started."""

    pid: int

    def cpu_seconds(self) -> float:
        """Of that process, without its children's."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(kind: ServerKind, model: Path, n_ctx: int) -> Iterator[RunningServer]:
    """A server that is ready; it is gone afterwards."""
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            kind.command(model, port, n_ctx), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_ready(process, port)
            server = RunningServer(f"http://127.0.0.1:{port}")
            server.pid = process.pid
            yield server
            if process.poll() is not None:
                raise ServerError(f"it ended with {process.returncode} while it was measured")
        except ServerError as error:
            log.seek(0)
            words = "\n".join(log.read().decode("utf-8", "replace").strip().splitlines()[-15:])
            raise ServerError(f"{kind.name}: {error}; its last words:\n{words}") from None
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"it ended with {process.returncode} while it started")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            finally:
                connection.close()
        time.sleep(0.1)
    raise ServerError(f"it was not ready after {START_SECONDS:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
