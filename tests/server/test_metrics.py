"""/metrics as Prometheus reads it, and the timelines of requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pyinfer.runtime.engine_client import EngineClient
from pyinfer.runtime.engine_messages import StepReport
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.outputs import EngineStats, RequestOutput
from pyinfer.runtime.request_events import RequestEvent
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.server import request_log
from pyinfer.server.request_log import RequestLog
from pyinfer.server.service import ServedModel, Service

pytestmark = pytest.mark.server


def scrape(url: str) -> dict[str, float]:
    """Samples without their labels but reason and bound."""
    reply = httpx.get(f"{url}/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(reply.text):
        assert family.name.startswith("pyinfer:") and family.documentation
        for sample in family.samples:
            assert sample.labels.pop("model_name") in ("tiny", "small")
            suffix = "".join(f"[{value}]" for value in sample.labels.values())
            values[sample.name.removeprefix("pyinfer:") + suffix] = sample.value
    return values


def complete(url: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "the sea is", "ignore_eos": True, "temperature": 0, **fields}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_counts_what_was_served(server: Any) -> None:
    server.wait_idle()
    before = scrape(server.url)
    start = time.monotonic()
    prompt_tokens = 0
    for n_tokens in (5, 9):
        prompt_tokens += complete(server.url, max_tokens=n_tokens, n=2)["usage"]["prompt_tokens"]
    seconds = time.monotonic() - start
    server.wait_idle()
    after = scrape(server.url)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["generation_tokens_total"] == 2 * (5 + 9)
    assert grown["prompt_tokens_total"] == prompt_tokens
    assert grown["request_success_total[length]"] == 4
    assert grown["request_success_total[stop]"] == grown["request_success_total[abort]"] == 0
    assert grown["time_to_first_token_seconds_count"] == grown["e2e_request_latency_seconds_count"] == 4
    assert grown["inter_token_latency_seconds_count"] == 2 * (4 + 8)
    assert grown["time_per_output_token_seconds_count"] == 4
    assert grown["request_queue_time_seconds_count"] == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "inter_token_latency_seconds"):
        assert 0 < grown[f"{name}_sum"] <= 2 * seconds
        assert grown[f"{name}_bucket[+Inf]"] == grown[f"{name}_count"]
    assert grown["prefix_cache_queries_total"] > 0
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


def test_openmetrics_where_it_is_asked_for(server: Any) -> None:
    reply = httpx.get(f"{server.url}/metrics", headers={"Accept": "application/openmetrics-text"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    families = openmetrics.text_string_to_metric_families(reply.text)  # type: ignore[no-untyped-call]
    assert len(list(families)) > 10


def test_timeline_of_a_request(server: Any) -> None:
    reply = complete(server.url, max_tokens=6, prompt="to be timed: " * 20)
    server.wait_idle()
    line = httpx.get(f"{server.url}/v1/requests/{reply['id']}/timeline").json()
    assert line["id"] == reply["id"] and line["state"] == "finished"
    assert line["prompt_tokens"] == reply["usage"]["prompt_tokens"]
    assert abs(line["arrival_time"] - time.time()) < 60
    kinds = [event["event"] for event in line["events"]]
    assert kinds[:3] == ["queued", "scheduled", "prompt"] and kinds[-1] == "finished"
    read = sum(event["tokens"] for event in line["events"] if event["event"] == "prompt")
    assert read + line["cached_tokens"] == line["prompt_tokens"]
    sample = line["samples"][0]
    assert sample["finish_reason"] == "length" and len(sample["token_times"]) == 6
    times = [event["time"] for event in line["events"]]
    assert times == sorted(times) and sample["token_times"] == sorted(sample["token_times"])
    again = complete(server.url, max_tokens=2, prompt="to be timed: " * 20)
    server.wait_idle()
    line = httpx.get(f"{server.url}/v1/requests/{again['id']}/timeline").json()
    assert line["cached_tokens"] == again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    error = httpx.get(f"{server.url}/v1/requests/nobody/timeline")
    assert error.status_code == 404 and error.json()["error"]["code"] == "request_not_found"


@pytest.fixture
def small_server(tiny_model: Any, start_server: Any) -> Iterator[str]:
    """Room for one long request, not for two."""
    path: Path = tiny_model()
    with load_model(path, n_threads=1, kv_cache_memory=160 << 10) as loaded:
        client = EngineClient.in_process(loaded.engine)
        service = Service(["small"])
        service.set_ready(
            ServedModel(client, loaded.tokenizer, loaded.chat_template, loaded.n_ctx, 512, loaded.chat_params)
        )
        url, stop = start_server(service)
        yield url
        stop()
        client.close()


def test_timeline_says_who_took_the_pages(small_server: str) -> None:
    reply = complete(small_server, prompt=["the sea is"] * 2, max_tokens=450)  # one body, so that both run at once
    assert scrape(small_server)["num_preemptions_total"] > 0
    ids = {f"{reply['id']}-{number}" for number in range(2)}
    lines = [httpx.get(f"{small_server}/v1/requests/{each}/timeline").json() for each in ids]
    preempted = [(line["id"], e["by"]) for line in lines for e in line["events"] if e["event"] == "preempted"]
    assert preempted and {each for pair in preempted for each in pair} <= ids
    assert preempted[0][0] != preempted[0][1]


def test_refused_requests_are_counted(tiny_model: Any, start_server: Any) -> None:
    with load_model(tiny_model(), n_threads=1, max_num_seqs=1, max_queue_wait=0.0) as loaded:
        client = EngineClient.in_process(loaded.engine)
        service = Service(["small"])
        service.set_ready(
            ServedModel(client, loaded.tokenizer, loaded.chat_template, loaded.n_ctx, 512, loaded.chat_params)
        )
        url, stop = start_server(service)
        complete(url, max_tokens=30)  # how long a step takes must be known

        def ask(_: int) -> int:
            body = {"prompt": "the sea is", "ignore_eos": True, "max_tokens": 400}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code

        with ThreadPoolExecutor(6) as pool:
            codes = list(pool.map(ask, range(6)))
        assert set(codes) == {200, 429}
        complete(url, max_tokens=2)  # a refusal is reported with the step after it
        assert scrape(url)["num_refused_requests_total"] == codes.count(429)
        stop()
        client.close()


def report(outputs: list[RequestOutput], events: list[RequestEvent] | None = None) -> StepReport:
    stats = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 0))
    return StepReport(time.monotonic(), 0.0, outputs, events or [], stats)


def test_log_is_bounded_and_survives_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_FINISHED", 3)
    monkeypatch.setattr(request_log, "MAX_EVENTS", 10)
    log = RequestLog()
    params = SamplingParams()
    for i in range(6):
        log.added(str(i), 4, params, time.monotonic())
    assert log.timeline("5")["state"] == "waiting"  # type: ignore[index]
    log.stepped(report([], [RequestEvent("5", 0, "prompt", time.monotonic(), 1) for _ in range(30)]))
    line = log.timeline("5")
    assert line is not None and len(line["events"]) == 10 and line["events_left_out"] == 21
    log.restarted(["1", "2", "3", "4", "5"], time.monotonic())  # the client of 0 has left
    assert log.engine_restarts == 1 and log.timeline("0")["state"] == "finished"  # type: ignore[index]
    assert log.timeline("1")["events"][-1]["event"] == "engine_died"  # type: ignore[index]
    for i in range(1, 6):
        log.stepped(report([RequestOutput(str(i), 0, [7], finish_reason="stop")]))
    assert [log.timeline(str(i)) is None for i in range(6)] == [True, True, True, False, False, False]
    assert log.ends["stop"] == log.generation_tokens == 5
    log.stepped(report([RequestOutput("5", 0, [7])]))  # nobody knows it any more
