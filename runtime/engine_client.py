"""`EngineClient`: the asyncio face of an engine that runs on its own thread.

What crosses over are messages (`Message` in, `RequestOutput` out), so that the thread can become a process. An engine
without work waits on a condition and takes no CPU.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from types import TracebackType

import msgspec

from pyinfer.errors import EngineError, RequestError, UnavailableError
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.outputs import EngineStats, RequestFailure, RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams

_log = logging.getLogger(__name__)
_STOPPED = RequestFailure("the engine has stopped; restart the server", "server_error", 503)


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    prompt: list[int]
    params: SamplingParams
    salt: str = ""


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int | None = None  # a single sample


Message = AddRequest | AbortRequest


class _Mailbox:
    """Where a request's chunks wait for its stream; lives on the stream's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, n_running: int) -> None:
        self.loop = loop
        self.n_running = n_running  # samples that the engine has not ended; guarded by the client's lock
        self.chunks: deque[RequestOutput] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def push(self, chunk: RequestOutput) -> None:
        self.chunks.append(chunk)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class RequestStream:
    """An async iterator over a request's chunks, until each sample has its finish reason.

    Leaving it early (`aclose`, `async with`, cancelling the task that iterates, dropping it) aborts the request.
    Iterating raises `EngineError` if the request fails. Used from one event loop.
    """

    def __init__(self, client: EngineClient, request_id: str, n_samples: int, mailbox: _Mailbox) -> None:
        self.request_id = request_id
        self._client = client
        self._n_open = n_samples
        self._mailbox = mailbox

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        mailbox = self._mailbox
        while not mailbox.chunks:
            if self._n_open == 0:
                raise StopAsyncIteration
            mailbox.waiter = mailbox.loop.create_future()
            try:
                await mailbox.waiter
            except asyncio.CancelledError:
                self._leave()
                raise
            finally:
                mailbox.waiter = None
        chunk = mailbox.chunks.popleft()
        if chunk.failure is not None:
            self._n_open = 0
            raise _error_of(chunk.failure)
        if chunk.finish_reason is not None:
            self._n_open -= 1
        return chunk

    async def aclose(self) -> None:
        """Abort what still runs and end the iteration."""
        self._leave()

    def _leave(self) -> None:
        if self._n_open:
            self._n_open = 0
            self._client._forget(self.request_id)
        self._mailbox.chunks.clear()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()


def _error_of(failure: RequestFailure) -> EngineError | UnavailableError:
    return UnavailableError(failure.message) if failure.http_status == 503 else EngineError(failure.message)


class EngineClient:
    """Any thread may call `abort` and `stats`; `generate` needs a running event loop, several loops may share it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._condition = threading.Condition()
        self._inbox: list[Message] = []
        self._mailboxes: dict[str, _Mailbox] = {}  # of requests that the engine has not ended
        self._is_draining = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="pyinfer-engine", daemon=True)
        self._thread.start()

    @classmethod
    def in_process(cls, engine: Engine) -> EngineClient:
        """A client whose engine loop runs on a thread of this process; from now on nobody else may step the engine."""
        return cls(engine)

    # ---- the asyncio side

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: str = "",
    ) -> RequestStream:
        """Submit a request now and return its chunks; raises `RequestError` at once if it can never be served."""
        params = SamplingParams() if params is None else params
        self._engine.limits.check(prompt_ids, params)
        request_id = uuid.uuid4().hex if request_id is None else request_id
        mailbox = _Mailbox(asyncio.get_running_loop(), params.n_samples)
        with self._condition:
            if self._is_draining or self._is_closed:
                raise UnavailableError("the server is shutting down and takes no new requests")
            if request_id in self._mailboxes:
                raise RequestError(f"request id {request_id!r} is in use by a running request", param="request_id")
            self._mailboxes[request_id] = mailbox
            self._inbox.append(AddRequest(request_id, list(prompt_ids), params, salt))
            self._condition.notify()
        return RequestStream(self, request_id, params.n_samples, mailbox)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its samples, within a step; its stream gets a last chunk with "abort"."""
        with self._condition:
            self._inbox.append(AbortRequest(request_id, index))
            self._condition.notify()

    def _forget(self, request_id: str) -> None:
        """Abort a request that nobody listens to any more."""
        with self._condition:
            if self._mailboxes.pop(request_id, None) is not None:
                self._inbox.append(AbortRequest(request_id))
                self._condition.notify()

    async def drain(self, timeout: float = 30.0) -> bool:
        """Take no new requests and wait for the running ones; aborts what is left after `timeout` seconds.

        True if all of them finished by themselves.
        """
        self._is_draining = True
        deadline = time.monotonic() + timeout
        while self._mailboxes and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        left = list(self._mailboxes)
        for request_id in left:
            self.abort(request_id)
        return not left

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def is_alive(self) -> bool:
        """False once the engine's thread has ended: after `close`, or because of a fault in it."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop the engine's thread; unfinished requests fail with `UnavailableError`. The engine itself stays open."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while (messages := self._next_messages()) is not None:
                outputs = [output for message in messages for output in self._handle(message)]
                outputs += self._engine.step()
                self._deliver(outputs)
        except Exception:
            _log.exception("the engine's thread ended")
        finally:
            self._end_all()

    def _next_messages(self) -> list[Message] | None:
        """What arrived since the last step; waits if there is nothing to do; None when closed."""
        with self._condition:
            while not self._inbox and not self._is_closed and not self._engine.has_work:
                self._condition.wait()
            if self._is_closed:
                return None
            messages, self._inbox = self._inbox, []
            return messages

    def _handle(self, message: Message) -> list[RequestOutput]:
        if isinstance(message, AbortRequest):
            return self._engine.abort(message.request_id, message.index)
        try:
            self._engine.add_request(message.request_id, message.prompt, message.params, salt=message.salt)
        except Exception as error:
            failure = RequestFailure(str(error), "server_error", 500)
            return [RequestOutput(message.request_id, failure=failure)]
        return []

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hand a step's chunks to their event loops, one call a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, RequestOutput]]] = {}
        with self._condition:
            for output in outputs:
                mailbox = self._mailboxes.get(output.request_id)
                if mailbox is None:
                    continue
                by_loop.setdefault(mailbox.loop, []).append((mailbox, output))
                mailbox.n_running -= output.finish_reason is not None
                if mailbox.n_running == 0 or output.failure is not None:
                    del self._mailboxes[output.request_id]
        for loop, chunks in by_loop.items():
            try:
                loop.call_soon_threadsafe(_push_all, chunks)
            except RuntimeError:  # the loop is closed: nobody listens any more
                for _, output in chunks:
                    self._forget(output.request_id)

    def _end_all(self) -> None:
        """Tell every listener, and leave the engine empty."""
        with self._condition:
            self._is_closed = True
            request_ids = list(self._mailboxes)
        for request_id in request_ids:
            try:
                self._engine.abort(request_id)
            except Exception:
                _log.exception("a request could not be ended")
        self._deliver([RequestOutput(request_id, failure=_STOPPED) for request_id in request_ids])


def _push_all(chunks: list[tuple[_Mailbox, RequestOutput]]) -> None:
    for mailbox, chunk in chunks:
        mailbox.push(chunk)
