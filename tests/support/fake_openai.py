"""An OpenAI-compatible server that answers with `token` as often as it is asked to: on a thread, over a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeOpenAI:
    """How it behaves, and what it saw. `tokenizer`: each word is a token, its id the word's length."""

    first_delay: float = 0.0  # seconds before the first chunk
    delay: float = 0.0  # seconds between chunks
    usage: bool = True
    role_chunk: bool = True  # a chat's first chunk carries no text
    cut_after: int | None = None  # chunks, then the connection is closed
    break_after: int | None = None  # chunks, then an error event
    gather: int = 0  # answer nobody before so many have asked
    refuse_every: int = 0  # every n-th completion is a 429
    bytes_at_once: int = 1 << 20  # the stream is written in pieces of this size
    tokenizes: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    n_running: int = 0
    most_running: int = 0
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            method, path, _ = lines[0].split(" ")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            fields = json.loads(body) if body else {}
            if path.startswith("/v1/") and method == "POST":
                await self._complete(writer, path, fields, headers)
            else:
                self._answer_whole(writer, path, fields)
            await writer.drain()
        writer.close()

    def _answer_whole(self, writer: asyncio.StreamWriter, path: str, fields: dict[str, Any]) -> None:
        if path == "/v1/models":
            _reply(writer, 200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})
        elif path == "/tokenize" and self.tokenizes:
            _reply(writer, 200, {"tokens": [len(word) for word in fields["content"].split()]})
        elif path == "/detokenize" and self.tokenizes:
            _reply(writer, 200, {"content": " ".join("x" * n for n in fields["tokens"])})
        else:
            _reply(writer, 404, {"error": {"message": "no such path"}})

    async def _complete(
        self, writer: asyncio.StreamWriter, path: str, fields: dict[str, Any], headers: dict[str, str]
    ) -> None:
        self.bodies.append(fields)
        self.headers.append(headers)
        if self.refuse_every and len(self.bodies) % self.refuse_every == 0:
            _reply(writer, 429, {"error": {"message": "too many requests", "type": "rate_limit"}})
            return
        self.n_running += 1
        self.most_running = max(self.most_running, self.n_running)
        try:
            while self.most_running < self.gather:
                await asyncio.sleep(0.005)
            await self._stream(writer, "chat" in path, fields)
        finally:
            self.n_running -= 1

    async def _stream(self, writer: asyncio.StreamWriter, is_chat: bool, fields: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        n, finish = fields["max_tokens"], {"finish_reason": "length"}
        if is_chat and self.role_chunk:
            await self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(n):
            await asyncio.sleep(self.delay if i else self.first_delay)
            if i == self.cut_after:
                writer.transport.abort()
                return
            if i == self.break_after:
                await self._event(writer, {"error": {"message": "out of luck"}})
                return
            text = "token "
            choice = {"index": 0, "delta": {"content": text}} if is_chat else {"index": 0, "text": text}
            await self._event(writer, {"choices": [choice]})
        last = {"index": 0, "delta": {}, **finish} if is_chat else {"index": 0, "text": "", **finish}
        await self._event(writer, {"choices": [last]})
        if self.usage:
            counts = {"prompt_tokens": 7, "completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 2}}
            await self._event(writer, {"choices": [], "usage": counts})
        await self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    async def _event(self, writer: asyncio.StreamWriter, event: object) -> None:
        text = event if isinstance(event, str) else json.dumps(event)
        data = f"data: {text}\n\n".encode()
        chunk = b"%x\r\n%s\r\n" % (len(data), data)
        for start in range(0, len(chunk), self.bytes_at_once):
            writer.write(chunk[start : start + self.bytes_at_once])
            await writer.drain()


def _reply(writer: asyncio.StreamWriter, status: int, fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


@contextmanager
def serve_fake(fake: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """Listens on a free port of the loopback address; `fake.url` names it."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stopped = asyncio.Event()

    async def run() -> None:
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await stopped.wait()
        server.close()

    def main(work: Coroutine[Any, Any, None]) -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(work)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=main, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(10)
