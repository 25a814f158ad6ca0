"""A small HTTP/1.1 client on an asyncio protocol: one connection a request, events handed on as they arrive.

A load generator shares the machine with what it measures and must not be what is measured. Here the event loop calls
`data_received` with each packet the moment it was read; no task is woken for it, and only its bytes are looked at.
On a Zen 4 core a chunk of 32 streams costs 24 us of CPU time, most of it the kernel's, against 75 us with httpx and
115 us with the openai package (`benchmarks/loadgen_cost.py`): at 1,000 tokens a second 2.4 % of one core, not 12 %.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from pyinfer.errors import ConfigError
from pyinfer.loadgen.http_reader import EventReader, HttpError, ResponseReader

MAX_BODY = 64 << 20  # bytes of a whole reply
OnEvent = Callable[[bytes, float], None]  # an event's data, and `time.perf_counter()` when its last byte was read


class StatusError(Exception):
    """The server answered with something other than 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {_shortened(body)}")
        self.status = status


def _shortened(body: bytes, limit: int = 300) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


class HttpClient:
    """Requests to one server. Use each call inside of `asyncio.timeout`: nothing here ends by itself."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """`base_url` like http://127.0.0.1:8000, with or without the /v1 that OpenAI's own clients want."""
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.username:
            raise ConfigError(f"--base-url {base_url!r} is not like http://127.0.0.1:8000", param="base_url")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.base_url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self._headers = f"Host: {parts.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()):
                raise ConfigError("the API key holds characters that no HTTP header can carry", param="api_key")
            self._headers += f"Authorization: Bearer {api_key}\r\n"

    async def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The body of a whole reply. Raises StatusError, HttpError or OSError."""
        exchange = await self._exchange(method, path, body, None)
        return bytes(exchange.body)

    async def stream(self, path: str, body: bytes, on_event: OnEvent) -> None:
        """POST `body`; `on_event` gets each event until the server ends the stream. Raises as `request`."""
        exchange = await self._exchange("POST", path, body, on_event)
        if not exchange.is_stream:
            raise HttpError(f"the reply is no event stream: {_shortened(bytes(exchange.body))}")

    async def _exchange(self, method: str, path: str, body: bytes, on_event: OnEvent | None) -> _Exchange:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        loop = asyncio.get_running_loop()
        exchange = _Exchange(head.encode("latin-1") + body, on_event, loop.create_future())
        transport, _ = await loop.create_connection(lambda: exchange, self._host, self._port, ssl=self._tls)
        try:
            await exchange.done
        finally:
            transport.abort()
        if exchange.reader.status != 200:
            raise StatusError(exchange.reader.status, bytes(exchange.body))
        return exchange


class _Exchange(asyncio.Protocol):
    """One request and its response; `done` is set when the response is complete or has failed."""

    def __init__(self, request: bytes, on_event: OnEvent | None, done: asyncio.Future[None]) -> None:
        self.done = done
        self.reader = ResponseReader()
        self.body = bytearray()  # of a reply that is no event stream
        self.is_stream = False
        self._events = EventReader()
        self._request = request
        self._on_event = on_event

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self._take(data, now)
        except Exception as error:
            self._fail(error)
            return
        if self.reader.is_complete and not self.done.done():
            self.done.set_result(None)

    def _take(self, data: bytes, now: float) -> None:
        body = self.reader.feed(data)
        if not self.is_stream:
            kind = self.reader.headers.get("content-type", "")
            self.is_stream = self.reader.status == 200 and kind.startswith("text/event-stream")
        if self.is_stream and self._on_event is not None:
            for event in self._events.feed(body):
                self._on_event(event, now)
            return
        self.body += body
        if len(self.body) > MAX_BODY:
            raise HttpError(f"the reply is longer than {MAX_BODY} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done.done():
            return
        try:
            if exc is not None:
                raise exc
            self.reader.feed_eof()
        except Exception as error:
            self._fail(error)
        else:
            self.done.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
