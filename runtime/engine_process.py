"""`EngineProcess`: an `EngineClient` whose engine runs in a process of its own, and is started again if it dies.

One thread owns the process: it starts it, hears its reports, notices when it dies or hangs, and starts a new one, to
which it gives the requests that were under way with the tokens they have. Sampling is keyed by seed and position, so
they go on as if nothing had been; the seeds that a request leaves open are therefore drawn here.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq

from pyinfer.errors import EngineError
from pyinfer.graph.backend import Progress
from pyinfer.runtime.engine_child import ChildEnd, EngineChild
from pyinfer.runtime.engine_client import STOPPED, EngineClient
from pyinfer.runtime.engine_loading import EngineLoading
from pyinfer.runtime.engine_messages import (
    AddRequest,
    Close,
    FromEngine,
    Loaded,
    Loading,
    Message,
    Started,
    StepReport,
)
from pyinfer.runtime.engine_totals import EngineTotals
from pyinfer.runtime.engine_wire import ClientWire, private_folder
from pyinfer.runtime.outputs import EngineStats, RequestFailure, RequestOutput
from pyinfer.runtime.request_ledger import SUSPECTED, RequestLedger
from pyinfer.runtime.request_limits import RequestLimits
from pyinfer.runtime.sample_masks import spell_bad_words
from pyinfer.runtime.step_watch import StepWatch
from pyinfer.runtime.vocabulary_facts import Vocabulary as VocabularyOf

_log = logging.getLogger(__name__)
_BACKOFF = (0.0, 0.0, 0.5, 1.0, 2.0)  # seconds before the next start, by deaths in a row; then it is given up
_CONNECT_SECONDS = 10.0  # the engine connects to both sockets at once
_GOODBYE_SECONDS = 2.0


class EngineProcess(EngineClient):
    """`load` makes it ready. `hang_seconds` is the least silence that counts as a hang."""

    def __init__(
        self, child: EngineChild | None = None, *, log_level: str = "warning", hang_seconds: float = 30.0
    ) -> None:
        super().__init__()
        self._log_level = log_level
        self._hang_seconds = hang_seconds
        self._child = child if child is not None else EngineChild(log_level)
        self._ledger = RequestLedger()
        self._totals = EngineTotals()
        self._seeds = random.Random(0)
        self._loading = EngineLoading()
        self._wire: ClientWire | None = None
        self._is_serving = False  # an engine is there and takes messages
        self._is_closing = False
        self._heard = 0.0  # when the engine last gave a sign of life, or got its first request after a pause
        self._n_deaths = 0  # in a row, without a chunk between them
        self._watch: StepWatch | None = None
        self._thread = threading.Thread(target=self._run, name="pyinfer-engine-link", daemon=True)
        self.on_failure: Callable[[str], None] | None = None  # the engine is given up; called on another thread
        self.n_restarts = 0

    # ---- loading

    def load(
        self,
        path: str | Path,
        options: Mapping[str, Any],
        tokenizer: Callable[[], VocabularyOf],
        progress: Progress | None = None,
    ) -> Loaded:
        """Load a model; `options` are those of `LoadOptions`. `tokenizer` is called here, while the engine loads.

        Raises the `PyinferError` that the engine met.
        """
        self._seeds = random.Random(options.get("seed", 0))
        self._loading.begin(path, options, progress)
        self._thread.start()
        try:
            known = tokenizer()
        except BaseException:
            self.close()
            raise
        with self._condition:
            self._loading.tokenizer = known
            if self._wire is not None and (vocabulary := self._loading.vocabulary()):
                self._wire.requests.send(vocabulary)
        loaded = self._loading.result()
        if loaded is None:
            self.close()
            raise self._loading.error or EngineError(STOPPED.message)
        return loaded

    # ---- the client's side

    @property
    def limits(self) -> RequestLimits:
        assert self._loading.loaded is not None, "load comes first"
        return self._loading.loaded.limits

    @property
    def pid(self) -> int:
        """The engine's; another after a restart."""
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    @property
    def is_ready(self) -> bool:
        return self._is_serving

    def stats(self) -> EngineStats:
        with self._condition:
            return self._totals.stats(len(self._ledger))

    def close(self) -> None:
        with self._condition:
            self._failure = self._failure or STOPPED
            self._is_closing = True
            if self._is_serving and self._wire is not None:
                self._wire.requests.send(Close())
            is_serving = self._is_serving
        if not is_serving or not self._child.wait(_GOODBYE_SECONDS):
            self._child.kill()
        if self._thread.ident is not None:
            self._thread.join()
        self._child.close()

    def _completed(self, request: AddRequest) -> AddRequest:
        tokenizer = self._loading.tokenizer
        assert tokenizer is not None
        params = request.params
        if params.seed is None:
            params = params.replace(seed=self._seeds.getrandbits(63))
        words = spell_bad_words(params.bad_words or (), tokenizer)
        return msgspec.structs.replace(request, params=params, bad_words=words)

    def _send(self, message: Message) -> None:
        if isinstance(message, AddRequest):
            if not len(self._ledger):
                self._heard = time.monotonic()
            self._ledger.add(message)
        elif message.index is None and message.request_id not in self._mailboxes:
            self._ledger.forget(message.request_id)
        else:
            self._ledger.abort(message)
        if self._is_serving and self._wire is not None:
            self._wire.requests.send(message)

    # ---- the link's thread

    def _run(self) -> None:
        failure = STOPPED
        try:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            try:
                failure = self._keep_alive(context)
            finally:
                context.destroy(linger=0)
        except Exception:
            _log.exception("the link to the engine ended")
        finally:
            self._is_serving = False
            was_closing = self._is_closing
            self._fail_all(failure)
            self._loading.is_settled.set()
            if self.on_failure is not None and self._loading.loaded is not None and not was_closing:
                self.on_failure(failure.message)

    def _keep_alive(self, context: zmq.Context[zmq.Socket[bytes]]) -> RequestFailure:
        """Serve with one engine after another; returns why there is none any more."""
        while True:
            end = self._serve(context)
            if self._is_closing or self._loading.loaded is None:
                return STOPPED
            self._n_deaths += 1
            if self._n_deaths > len(_BACKOFF):
                text = f"the engine died {self._n_deaths} times in a row, last with {end.how}; restart the server"
                return RequestFailure(text, "server_error", 503)
            _log.warning("the engine died with %s; it is started again", end.how)
            time.sleep(_BACKOFF[self._n_deaths - 1])
            with self._condition:
                if self._is_closing:
                    return STOPPED
                self._child.close()
                self._child = EngineChild(self._log_level)
            self.n_restarts += 1

    def _serve(self, context: zmq.Context[zmq.Socket[bytes]]) -> ChildEnd:
        """Serve with the present child; returns how it ended."""
        child = self._child
        wire = ClientWire.open(context, private_folder())
        try:
            child.connect(msgspec.json.encode(wire.address))
            end = self._listen(wire, child)
        finally:
            with self._condition:
                was_serving, self._is_serving, self._wire = self._is_serving, False, None
            wire.close()
        if was_serving and not self._is_closing:
            self._mourn(end)
        return end

    def _listen(self, wire: ClientWire, child: EngineChild) -> ChildEnd:
        poller = zmq.Poller()
        poller.register(wire.reports, zmq.POLLIN)
        if os.name != "nt":
            poller.register(child.fileno(), zmq.POLLIN)
        while True:
            ready = poller.poll(1000 if os.name != "nt" else 100)
            # asked first: what it said before its end is then all there; reports alone say that it lives
            has_ended = ready != [(wire.reports, zmq.POLLIN)] and child.has_ended()
            while (message := wire.receive()) is not None:
                self._hear(message, wire)
            if has_ended:
                end = child.end()
                self._loading.died(end.how)
                return end
            if self._is_hung():
                child.kill()
                seconds = self._watch.limit if self._watch else 0.0
                return ChildEnd(f"a step of over {seconds:.0f} s, after which it was killed", is_foreign=False)

    def _is_hung(self) -> bool:
        if not self._is_serving or self._watch is None:
            return False
        with self._condition:
            return len(self._ledger) > 0 and time.monotonic() - self._heard > self._watch.limit

    def _hear(self, message: FromEngine, wire: ClientWire) -> None:
        if isinstance(message, StepReport):
            self._hear_report(message)
        elif isinstance(message, Started):
            with self._condition:
                self._wire = wire
                wire.requests.send(self._loading.message, wait=_CONNECT_SECONDS)
                if vocabulary := self._loading.vocabulary():
                    wire.requests.send(vocabulary)
        elif isinstance(message, Loading):
            self._loading.advance(message)
        elif isinstance(message, Loaded):
            self._hear_loaded(message, wire)
        elif self._loading.loaded is None:
            self._loading.fail(message)
        else:
            _log.error("the engine cannot load the model again: %s", message.message)

    def _hear_loaded(self, message: Loaded, wire: ClientWire) -> None:
        wire.unlink()
        if self._watch is None:
            self._watch = StepWatch(message.config.max_tokens, floor=self._hang_seconds)
        with self._condition:
            for each in self._ledger.messages():
                wire.requests.send(each)
            self._heard = time.monotonic()
            self._is_serving = True
        self._loading.succeed(message)

    def _hear_report(self, report: StepReport) -> None:
        with self._condition:
            self._heard = time.monotonic()
            n_tokens = self._totals.take(report.stats)
            for output in report.outputs:
                self._ledger.note(output)
        self._deliver(report.outputs)
        if report.outputs:
            self._n_deaths = 0
        if self._watch is not None:
            self._watch.note(report.seconds, n_tokens)
        if self.observer is not None:
            self.observer.stepped(report)

    def _mourn(self, end: ChildEnd) -> None:
        """The engine died while it served: note that, and give up requests that may be the cause."""
        with self._condition:
            suspects = [] if end.is_foreign else self._ledger.count_death()
            self._totals.restart()
            request_ids = self._ledger.request_ids
        if suspects:
            self._n_deaths = 0
            self._deliver([RequestOutput(request_id, failure=SUSPECTED) for request_id in suspects])
        if self.observer is not None:
            self.observer.restarted(request_ids, time.monotonic())
