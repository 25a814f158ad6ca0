"""One run: requests sent as they arrive, at most so many at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyinfer.loadgen.arrivals import arrival_times
from pyinfer.loadgen.http_client import HttpClient
from pyinfer.loadgen.openai_stream import LoadRequest, RequestRecord, SendOptions, send


@dataclass(frozen=True)
class RunResult:
    """One record a request, in the order of arrival, and how long it all took in seconds."""

    records: list[RequestRecord]
    duration: float


async def run_load(
    client: HttpClient,
    requests: Sequence[LoadRequest],
    options: SendOptions,
    *,
    request_rate: float = float("inf"),
    max_concurrency: int | None = None,
    seed: int = 0,
    time_limit: float | None = None,
    on_done: Callable[[RequestRecord], None] | None = None,
) -> RunResult:
    """Send all requests and wait for their answers; what is not done within `time_limit` seconds has failed.

    A request over `max_concurrency` waits here: its clock starts when it is sent.
    """
    records = [RequestRecord(request.n_prompt) for request in requests]
    places = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    begin = time.perf_counter()

    async def one(request: LoadRequest, record: RequestRecord, arrival: float) -> None:
        await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
        async with places:
            await send(client, request, options, record)
        if on_done is not None:
            on_done(record)

    arrivals = arrival_times(len(requests), request_rate, seed)
    tasks = [asyncio.create_task(one(*item)) for item in zip(requests, records, arrivals, strict=True)]
    late: set[asyncio.Task[None]] = set()
    try:
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=time_limit)
        duration = time.perf_counter() - begin
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for task, record, result in zip(tasks, records, results, strict=True):
        if task in late:
            record.error = f"not done within the run's {time_limit:g} s"
        elif isinstance(result, BaseException):
            raise result
    return RunResult(records, duration)


async def warm_up(client: HttpClient, requests: Sequence[LoadRequest], options: SendOptions) -> RequestRecord | None:
    """Send requests one after the other, uncounted; returns the record of the first that failed."""
    for request in requests:
        record = RequestRecord(request.n_prompt)
        await send(client, request, options, record)
        if not record.is_ok:
            return record
    return None
