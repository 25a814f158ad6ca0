"""GET /metrics for Prometheus, with vLLM's names and meanings under our prefix, and /v1/requests/ID/timeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from pyinfer.errors import ModelNotFoundError
from pyinfer.runtime.outputs import EngineStats
from pyinfer.server.errors import json_response
from pyinfer.server.reply import service_of
from pyinfer.server.request_log import MAX_FINISHED, RequestLog

if TYPE_CHECKING:
    from prometheus_client import Metric

router = APIRouter()

_GAUGES = (
    ("num_requests_running", "running", "Samples in the running batch."),
    ("num_requests_waiting", "waiting", "Samples that wait to be scheduled."),
    ("kv_cache_usage_perc", "kv_usage", "Share of the KV pages that requests hold; 1 is all."),
)
_COUNTERS = (
    ("prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache."),
    ("num_preemptions", "preemptions", "Times that a sample gave its pages to another."),
    ("num_refused_requests", "refusals", "Requests refused as they would have waited longer than --max-queue-wait."),
)
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "time_to_first_token", "From a request's arrival to its first token."),
    ("inter_token_latency_seconds", "inter_token_latency", "Between two tokens of a sample."),
    (
        "time_per_output_token_seconds",
        "time_per_output_token",
        "A sample's mean time between tokens: (end - first token) / (tokens - 1).",
    ),
    ("e2e_request_latency_seconds", "e2e_request_latency", "From a request's arrival to its end."),
    ("request_queue_time_seconds", "request_queue_time", "From a request's arrival to its first step."),
)
_REASONS = ("stop", "length", "abort")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    service = service_of(request)
    stats = service.model().client.stats()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service.log, stats, service.names[0]))
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"content-type": content_type})


class _Collector:
    """One scrape."""

    def __init__(self, log: RequestLog, stats: EngineStats, model: str) -> None:
        self._log = log
        self._stats = stats
        self._model = model

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        log, model = self._log, [self._model]
        labels = ["model_name"]
        for name, field, text in _GAUGES:
            gauge = GaugeMetricFamily(f"pyinfer:{name}", text, labels=labels)
            gauge.add_metric(model, getattr(self._stats, field))
            yield gauge
        counts = [(name, getattr(self._stats, field), text) for name, field, text in _COUNTERS]
        counts += [
            ("prompt_tokens", log.prompt_tokens, "Prompt tokens of the requests that got a token."),
            ("generation_tokens", log.generation_tokens, "Tokens generated."),
            ("request_failures", log.ends["error"], "Requests that the engine failed."),
            ("engine_restarts", log.engine_restarts, "Times that the engine's process died and was started again."),
        ]
        for name, count, text in counts:
            counter = CounterMetricFamily(f"pyinfer:{name}", text, labels=labels)
            counter.add_metric(model, count)
            yield counter
        ends = CounterMetricFamily(
            "pyinfer:request_success", "Samples that ended.", labels=[*labels, "finished_reason"]
        )
        for reason in _REASONS:
            ends.add_metric([*model, reason], log.ends[reason])
        yield ends
        for name, field, text in _HISTOGRAMS:
            values = getattr(log, field)
            histogram = HistogramMetricFamily(f"pyinfer:{name}", text, labels=labels)
            histogram.add_metric(model, values.cumulative(), values.total)
            yield histogram


@router.get("/v1/requests/{request_id}/timeline")
async def timeline(request: Request, request_id: str) -> Response:
    """When a request was queued, scheduled, read, preempted and by whom, and each of its tokens."""
    found = service_of(request).log.timeline(request_id)
    if found is None:
        raise ModelNotFoundError(
            f"there is no request {request_id!r} among those that run and the last {MAX_FINISHED} that ended",
            param="request_id",
            code="request_not_found",
        )
    return json_response(msgspec.json.encode(found))
