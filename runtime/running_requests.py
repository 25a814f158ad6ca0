"""`RunningRequests`: the requests that an engine has taken and not ended, and how they end."""

from __future__ import annotations

from collections.abc import Callable

from pyinfer.errors import RequestError
from pyinfer.runtime.outputs import FinishReason, FloatMatrix, RequestFailure, RequestMetrics, RequestOutput
from pyinfer.runtime.request import Request, Sequence, State
from pyinfer.runtime.scheduler import Scheduler


class RunningRequests:
    """Keeps the scheduler in step: who is in here has its sequences there."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self.n_finished = 0

    def __len__(self) -> int:
        return len(self._requests)

    def check_id(self, request_id: str) -> None:
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use by a running request", param="request_id")

    def add(self, request: Request) -> None:
        self._requests[request.id] = request
        for sequence in request.sequences:
            self._scheduler.add(sequence)

    def end(self, sequence: Sequence, output: RequestOutput, reason: FinishReason) -> RequestOutput:
        """A sequence's last chunk, completed."""
        self._scheduler.finish(sequence)
        sequence.metrics.finished_time = self._clock()
        if reason != "abort" and sequence.wants_next:
            self._scheduler.predictor.learn(sequence.request.route, sequence.n_prompt, sequence.n_output)
        output.finish_reason = reason
        output.metrics = sequence.metrics
        request = sequence.request
        if request.is_finished:
            self.n_finished += 1
            if sequence.logits is None or reason == "abort":  # else it stays for `take_logits`
                del self._requests[request.id]
        return output

    def end_search(
        self, request: Request, outputs: list[RequestOutput], reason: FinishReason | None = None
    ) -> list[RequestOutput]:
        """End all beams; `outputs` are the search's last words, whose reasons may be given already."""
        for sequence in request.sequences:
            self._scheduler.finish(sequence)
        del self._requests[request.id]
        self.n_finished += 1
        metrics = request.sequences[0].metrics  # they share one
        metrics.finished_time = self._clock()
        for output in outputs:
            output.finish_reason = reason or output.finish_reason
            output.metrics = metrics
        return outputs

    def abort(self, request_id: str, index: int | None = None) -> list[RequestOutput]:
        """See `Engine.abort`."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        if request.is_finished:  # scored, and its logits were not taken
            del self._requests[request_id]
        if request.beams is not None:
            return self.end_search(request, [RequestOutput(request_id, i) for i in range(request.params.n)], "abort")
        sequences = [s for s in request.sequences if s.state is not State.FINISHED and index in (None, s.index)]
        return [self.end(sequence, RequestOutput(request_id, sequence.index), "abort") for sequence in sequences]

    def fail(self, sequences: list[Sequence], message: str) -> list[RequestOutput]:
        """End the whole requests that these sequences belong to, each with one chunk that says why."""
        failure = RequestFailure(message, "server_error", 500)
        outputs: list[RequestOutput] = []
        for request in {id(s.request): s.request for s in sequences}.values():
            for sequence in request.sequences:
                self._scheduler.finish(sequence)
            self._requests.pop(request.id, None)
            self.n_finished += 1
            metrics: RequestMetrics = request.sequences[0].metrics
            outputs.append(RequestOutput(request.id, failure=failure, metrics=metrics))
        return outputs

    def take_logits(self, request_id: str) -> FloatMatrix:
        """See `Engine.take_logits`."""
        request = self._requests.pop(request_id)
        logits = request.sequences[0].logits
        assert logits is not None and request.is_finished
        return logits

    def check(self) -> None:
        """Assert that the scheduler has exactly the sequences of these requests."""
        queued = {id(s) for s in (*self._scheduler.waiting, *self._scheduler.running)}
        known = {id(s) for r in self._requests.values() for s in r.sequences if s.state is not State.FINISHED}
        assert queued == known, "requests leak"
