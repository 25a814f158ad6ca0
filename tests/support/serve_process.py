"""`pyinfer serve` as a user starts it, in a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

PYINFER = [sys.executable, "-m", "pyinfer"]
ROOT = Path(__file__).parent.parent.parent


@contextlib.contextmanager
def serving(
    model: Path | str, *options: str, program: list[str] = PYINFER
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process that is ready, and its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*program, "serve", str(model), "--port", str(port), "-t", "1", "--kv-cache-memory", "64M", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        seen = set()
        for _ in range(2400):
            with contextlib.suppress(httpx.TransportError):
                seen.add(httpx.get(f"{url}/health").status_code)
            if 200 in seen:
                break
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.025)
        assert 200 in seen and seen <= {200, 503}
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
