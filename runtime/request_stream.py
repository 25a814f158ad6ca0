"""`RequestStream`: one request's chunks on the event loop that asked for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

from pyinfer.errors import EngineError, OverloadedError, PyinferError, UnavailableError
from pyinfer.runtime.outputs import RequestFailure, RequestOutput


class Mailbox:
    """Where a request's chunks wait for its stream; lives on the stream's event loop."""

    __slots__ = ("chunks", "loop", "n_running", "waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop, n_running: int) -> None:
        self.loop = loop
        self.n_running = n_running  # samples that the engine has not ended; guarded by the client's lock
        self.chunks: list[RequestOutput] = []
        self.waiter: asyncio.Future[None] | None = None

    def push(self, chunk: RequestOutput) -> None:
        self.chunks.append(chunk)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class RequestStream:
    """A request's chunks, until each sample has its finish reason: an async iterator, or `take` for many at once.

    Leaving it early (`aclose`, `async with`, cancelling the task that iterates, dropping it) aborts the request.
    Iterating raises `EngineError` if the request fails, `OverloadedError` if it is not taken. Used from one event loop.
    """

    def __init__(self, request_id: str, n_samples: int, mailbox: Mailbox, forget: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._n_open = n_samples
        self._mailbox = mailbox
        self._forget = forget  # called when nobody listens any more
        self._taken: deque[RequestOutput] = deque()  # what `__anext__` has not returned yet

    async def take(self) -> list[RequestOutput]:
        """All chunks that are there by now, at least one; none at the end."""
        mailbox = self._mailbox
        if not mailbox.chunks:
            if self._n_open == 0:
                return []
            await self._arrival()
        chunks, mailbox.chunks = mailbox.chunks, []
        for i, chunk in enumerate(chunks):
            if chunk.failure is not None:
                if i:  # first what came before it
                    mailbox.chunks = chunks[i:]
                    return chunks[:i]
                self._n_open = 0
                raise _error_of(chunk.failure)
            if chunk.finish_reason is not None:
                self._n_open -= 1
        return chunks

    async def _arrival(self) -> None:
        mailbox = self._mailbox
        mailbox.waiter = mailbox.loop.create_future()
        try:
            await mailbox.waiter
        except asyncio.CancelledError:
            self._leave()
            raise
        finally:
            mailbox.waiter = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._taken:
            self._taken.extend(await self.take())
        if not self._taken:
            raise StopAsyncIteration
        return self._taken.popleft()

    async def aclose(self) -> None:
        """Abort what still runs and end the iteration."""
        self._leave()

    def _leave(self) -> None:
        if self._n_open:
            self._n_open = 0
            self._forget(self.request_id)
        self._mailbox.chunks.clear()
        self._taken.clear()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()


def _error_of(failure: RequestFailure) -> PyinferError:
    if failure.retry_after is not None:
        return OverloadedError(failure.message, retry_after=failure.retry_after)
    return UnavailableError(failure.message) if failure.http_status == 503 else EngineError(failure.message)
