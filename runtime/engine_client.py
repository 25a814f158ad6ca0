"""`EngineClient`: the asyncio face of an engine that runs elsewhere, on a thread (`EngineThread`) or in a process of
its own (`EngineProcess`)."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from pyinfer.errors import RequestError, UnavailableError
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.engine_messages import AbortRequest, AddRequest, Message, StepReport
from pyinfer.runtime.outputs import EngineStats, RequestFailure, RequestOutput
from pyinfer.runtime.request_limits import RequestLimits
from pyinfer.runtime.request_stream import Mailbox, RequestStream
from pyinfer.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pyinfer.runtime.engine import Engine

STOPPED = RequestFailure("the engine has stopped; restart the server", "server_error", 503)
_DRAINING = "the server is shutting down and takes no new requests"


class Observer(Protocol):
    """Is told what happens, for metrics and timelines. Times are those of `time.monotonic`."""

    def added(self, request_id: str, n_prompt: int, params: SamplingParams, now: float) -> None:
        """A request was taken; called on the event loop."""

    def stepped(self, report: StepReport) -> None:
        """The engine did a step; called on the client's thread, after the chunks were handed on."""

    def restarted(self, request_ids: list[str], now: float) -> None:
        """The engine died; these requests go on in a new one."""


class EngineClient(ABC):
    """Any thread may call `abort` and `stats`; `generate` needs a running event loop, several loops may share it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._mailboxes: dict[str, Mailbox] = {}  # of requests that the engine has not ended
        self._is_draining = False
        self._failure: RequestFailure | None = None  # why no request is taken any more
        self.observer: Observer | None = None

    @staticmethod
    def in_process(engine: Engine) -> EngineClient:
        """A client whose engine loop runs on a thread of this process; from now on nobody else may step the engine."""
        from pyinfer.runtime.engine_thread import EngineThread

        return EngineThread(engine)

    # ---- what the two kinds differ in

    @property
    @abstractmethod
    def limits(self) -> RequestLimits:
        """What the engine can serve at all."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """As of the last step."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """False once the engine has ended for good: after `close`, or because of a fault in it."""

    @property
    def is_ready(self) -> bool:
        """False while there is no engine at work: it has ended, or is being started again."""
        return self.is_alive

    @abstractmethod
    def close(self) -> None:
        """End the engine's loop; unfinished requests fail with `UnavailableError`."""

    @abstractmethod
    def _send(self, message: Message) -> None:
        """Hand a message to the engine; called with the lock held."""

    def _completed(self, request: AddRequest) -> AddRequest:
        """With what only this side knows."""
        return request

    # ---- requests

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: str = "",
        route: str = "",
    ) -> RequestStream:
        """Submit a request now and return its chunks; raises `RequestError` at once if it can never be served.

        Only requests of the same salt share pages; those of a route are taken to have answers of like lengths.
        """
        params = SamplingParams() if params is None else params
        self.limits.check(prompt_ids, params)
        return self._submit(AddRequest(request_id or uuid.uuid4().hex, list(prompt_ids), params, salt, route=route))

    def beam_search(
        self,
        prompt_ids: list[int],
        params: BeamSearchParams,
        *,
        request_id: str | None = None,
        salt: str = "",
        route: str = "",
    ) -> RequestStream:
        """Like `generate`; the chunks come at the end, one a text, the best first."""
        self.limits.check_beam_search(prompt_ids, params)
        name = request_id or uuid.uuid4().hex
        return self._submit(AddRequest(name, list(prompt_ids), params.sampling, salt, route=route, beams=params))

    def _submit(self, request: AddRequest) -> RequestStream:
        request_id, n_samples = request.request_id, request.params.n_samples
        mailbox = Mailbox(asyncio.get_running_loop(), n_samples)
        with self._condition:
            if self._failure is not None:
                raise UnavailableError(self._failure.message)
            if self._is_draining:
                raise UnavailableError(_DRAINING)
            if request_id in self._mailboxes:
                raise RequestError(f"request id {request_id!r} is in use by a running request", param="request_id")
            self._mailboxes[request_id] = mailbox
            if self.observer is not None:
                self.observer.added(request_id, len(request.prompt), request.params, time.monotonic())
            self._send(self._completed(request))
        return RequestStream(request_id, n_samples, mailbox, self._forget)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its samples, within a step; its stream gets a last chunk with "abort"."""
        with self._condition:
            self._send(AbortRequest(request_id, index))

    def _forget(self, request_id: str) -> None:
        """Abort a request that nobody listens to any more."""
        with self._condition:
            if self._mailboxes.pop(request_id, None) is not None:
                self._send(AbortRequest(request_id))

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

    # ---- chunks

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hand a step's chunks to their event loops, one call a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, RequestOutput]]] = {}
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

    def _fail_all(self, failure: RequestFailure) -> list[str]:
        """Tell every listener that nothing more comes, and take no more requests; returns the requests' ids."""
        with self._condition:
            self._failure = failure
            request_ids = list(self._mailboxes)
        self._deliver([RequestOutput(request_id, failure=failure) for request_id in request_ids])
        return request_ids


def _push_all(chunks: list[tuple[Mailbox, RequestOutput]]) -> None:
    for mailbox, chunk in chunks:
        mailbox.push(chunk)
