"""`RequestLog`: what became of each request, for /metrics and the timelines. It observes the engine's client.

Times are those of `time.monotonic`, whose zero all processes of a machine share.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import Counter, OrderedDict
from typing import Any

from pyinfer.runtime.engine_messages import StepReport
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.request_events import RequestEvent
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.server.histogram import FIRST_TOKEN, REQUEST, TOKEN, Histogram

MAX_FINISHED = 512  # requests whose timelines are kept after their end
MAX_EVENTS = 1000  # a request's; what happens later is only counted


class _Sample:
    __slots__ = ("finish_reason", "first_token", "times")

    def __init__(self) -> None:
        self.times = array("d")  # of each token: the end of the engine's step that made it
        self.first_token = 0.0  # when it was handed on
        self.finish_reason: str | None = None


class _Record:
    __slots__ = ("arrival", "arrival_wall", "cached", "events", "left_out", "n_prompt", "samples", "scheduled")

    def __init__(self, n_prompt: int, n_samples: int, now: float) -> None:
        self.arrival = now
        self.arrival_wall = time.time()
        self.n_prompt = n_prompt
        self.cached = 0
        self.scheduled = 0.0
        self.samples = [_Sample() for _ in range(n_samples)]
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        self.left_out = 0

    def note(self, now: float, kind: str, **facts: Any) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append((now, kind, facts))
        else:
            self.left_out += 1


class RequestLog:
    """Any thread may call anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, _Record] = {}
        self._finished: OrderedDict[str, _Record] = OrderedDict()
        self.time_to_first_token = Histogram(FIRST_TOKEN)
        self.inter_token_latency = Histogram(TOKEN)
        self.time_per_output_token = Histogram(TOKEN)
        self.e2e_request_latency = Histogram(REQUEST)
        self.request_queue_time = Histogram(REQUEST)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.ends: Counter[str] = Counter()  # finish reason, or "error" -> samples
        self.engine_restarts = 0

    # ---- the client's observer

    def added(self, request_id: str, n_prompt: int, params: SamplingParams, now: float) -> None:
        record = _Record(n_prompt, params.n_samples, now)
        record.note(now, "queued")
        with self._lock:
            self._running[request_id] = record

    def stepped(self, report: StepReport) -> None:
        now = time.monotonic()
        with self._lock:
            for event in report.events:
                record = self._running.get(event.request_id)
                if record is not None:
                    self._take_event(record, event)
            for output in report.outputs:
                record = self._running.get(output.request_id)
                if record is not None:
                    self._take_output(record, output, report.time, now)

    def restarted(self, request_ids: list[str], now: float) -> None:
        with self._lock:
            self.engine_restarts += 1
            kept = set(request_ids)
            for request_id in list(self._running):
                record = self._running[request_id]
                record.note(now, "engine_died")
                if request_id not in kept:  # its client has left, or it was given up
                    self._end(request_id, record)

    def _take_event(self, record: _Record, event: RequestEvent) -> None:
        facts: dict[str, Any] = {"tokens": event.n_tokens}
        if event.kind == "scheduled":
            if record.scheduled == 0.0:
                record.scheduled = event.time
                record.cached = event.n_tokens
                self.request_queue_time.add(max(0.0, event.time - record.arrival))
            facts = {"cached_tokens": event.n_tokens}
        if event.by is not None:
            facts["by"] = event.by
        if event.index:
            facts["sample"] = event.index
        record.note(event.time, event.kind, **facts)

    def _take_output(self, record: _Record, output: RequestOutput, step_end: float, now: float) -> None:
        if output.failure is not None:
            record.note(now, "failed", message=output.failure.message)
            self.ends["error"] += 1
            self._end(output.request_id, record)
            return
        sample = record.samples[output.index]
        times = sample.times
        n_new = len(output.new_token_ids)
        if n_new:
            self.generation_tokens += n_new
            if times:
                self.inter_token_latency.add(step_end - times[-1])
            else:
                sample.first_token = now
                self.time_to_first_token.add(now - record.arrival)
                if output.index == 0:
                    self.prompt_tokens += record.n_prompt
            for _ in range(n_new):
                times.append(step_end)
        if output.finish_reason is not None:
            self._finish(record, sample, output, now)

    def _finish(self, record: _Record, sample: _Sample, output: RequestOutput, now: float) -> None:
        sample.finish_reason = reason = output.finish_reason
        assert reason is not None
        self.ends[reason] += 1
        self.e2e_request_latency.add(now - record.arrival)
        if len(sample.times) > 1:
            self.time_per_output_token.add((now - sample.first_token) / (len(sample.times) - 1))
        facts: dict[str, Any] = {"reason": reason, "tokens": len(sample.times)}
        if output.index:
            facts["sample"] = output.index
        record.note(now, "finished", **facts)
        if all(each.finish_reason is not None for each in record.samples):
            self._end(output.request_id, record)

    def _end(self, request_id: str, record: _Record) -> None:
        del self._running[request_id]
        self._finished[request_id] = record
        if len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)

    # ---- timelines

    def timeline(self, request_id: str) -> dict[str, Any] | None:
        """A request that runs or ended lately, for JSON; times in seconds after its arrival."""
        with self._lock:
            running = self._running.get(request_id)
            record = running or self._finished.get(request_id)
            if record is None:
                return None
            start = record.arrival
            return {
                "id": request_id,
                "state": "finished" if running is None else "waiting" if record.scheduled == 0.0 else "running",
                "arrival_time": record.arrival_wall,
                "arrival_monotonic": start,
                "prompt_tokens": record.n_prompt,
                "cached_tokens": record.cached,
                "events": [
                    {"time": _round(at - start), "event": kind, **facts} for at, kind, facts in _sorted_events(record)
                ],
                "events_left_out": record.left_out,
                "samples": [
                    {
                        "index": index,
                        "finish_reason": sample.finish_reason,
                        "token_times": [_round(at - start) for at in sample.times],
                    }
                    for index, sample in enumerate(record.samples)
                ],
            }


def _sorted_events(record: _Record) -> list[tuple[float, str, dict[str, Any]]]:
    """An event's time is when it happened, which is not always when it was heard of."""
    return sorted(record.events, key=lambda event: event[0])


def _round(seconds: float) -> float:
    return round(seconds, 6)
