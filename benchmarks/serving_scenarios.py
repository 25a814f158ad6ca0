"""What clients do to a server, and the figures that come of it; the same for every server.

Every loop is bounded in requests and, by `time_limit`, in seconds.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pyinfer.loadgen.http_client import HttpClient
from pyinfer.loadgen.metrics import itls, summarize, ttft
from pyinfer.loadgen.openai_stream import LoadRequest, RequestRecord, SendOptions, send
from pyinfer.loadgen.runner import run_load, warm_up
from pyinfer.loadgen.tokens import Tokenizer, ordinary_ids
from pyinfer.loadgen.workload import RandomWorkload

_DECODED = 5  # chunks that every stream has when the long prompt arrives
Figures = dict[str, float]


class LoadError(Exception):
    """Requests failed, so that the figures would mean nothing."""


@dataclass(frozen=True)
class Target:
    """A server that runs, and the words to make prompts of."""

    url: str
    model: str
    ids: Sequence[int]
    time_limit: float

    @classmethod
    async def at(cls, url: str, model: str, tokenizer: Tokenizer, time_limit: float) -> Target:
        return cls(url, model, await ordinary_ids(tokenizer, 0), time_limit)

    @property
    def client(self) -> HttpClient:
        return HttpClient(self.url)

    @property
    def options(self) -> SendOptions:
        return SendOptions(self.model, timeout=self.time_limit)

    def prompts(self, workload: RandomWorkload, n: int, seed: int) -> list[LoadRequest]:
        return workload.make(n, self.ids, seed)

    async def warm_up(self, requests: Sequence[LoadRequest]) -> None:
        failed = await warm_up(self.client, requests, self.options)
        if failed is not None:
            raise LoadError(f"the warm-up request failed: {failed.error}")


async def mix(target: Target, requests: Sequence[LoadRequest], clients: int) -> Figures:
    """Requests of real lengths, `clients` at a time."""
    await target.warm_up(target.prompts(RandomWorkload(64, 16), 1, seed=99))
    result = await run_load(
        target.client, requests, target.options, max_concurrency=clients, time_limit=target.time_limit
    )
    summary = summarize(result.records, result.duration, percentiles=(95.0,))
    check(result.records)
    figures = {"output tokens/s": summary.output_throughput}
    if len(requests) > clients:
        figures["output tokens/s, all busy"] = busy_rate(result.records)
    return figures | {
        "p95 TTFT ms": summary.distributions["ttft"].percentiles[95.0],
        "p95 ITL ms": summary.distributions["itl"].percentiles[95.0],
    }


def busy_rate(records: Sequence[RequestRecord]) -> float:
    """Output tokens a second until the last request is sent: so long every client has one running.

    In a short run the longest answers end alone, and the plain throughput says more about them than about the server.
    """
    begin, end = min(record.start for record in records), max(record.start for record in records)
    tokens = 0.0
    for record in records:
        times = record.chunk_times
        tokens += record.n_output * sum(time <= end for time in times) / len(times)
    return tokens / (end - begin)


async def long_prompt(target: Target, streams: int, n_prompt: int) -> Figures:
    """Streams that decode while one long prompt arrives: gaps that overlap its time to the first token."""
    await target.warm_up(target.prompts(RandomWorkload(64, 16), 1, seed=99))
    decoding = target.prompts(RandomWorkload(32, 2000), streams, seed=1)
    [late] = target.prompts(RandomWorkload(n_prompt, 4), 1, seed=2)
    records, record = [RequestRecord(r.n_prompt) for r in decoding], RequestRecord(n_prompt)
    tasks = [asyncio.create_task(_send(target, *pair)) for pair in zip(decoding, records, strict=True)]
    try:
        async with asyncio.timeout(target.time_limit):
            while any(len(r.chunk_times) < _DECODED for r in records):
                check([r for r, task in zip(records, tasks, strict=True) if task.done()])
                await asyncio.sleep(0.01)
            await _send(target, late, record)
    except TimeoutError:
        raise LoadError(f"not done within {target.time_limit:g} s") from None
    finally:
        ended_early = sum(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    check([record])
    if ended_early:
        raise LoadError(f"{ended_early} streams ended before the long prompt was read")
    begin, end = record.start, record.chunk_times[0]
    gaps = [b - a for r in records for a, b in pairwise(r.chunk_times) if b > begin and a < end]
    before = [gap for r in records for gap in itls(r)[: _DECODED - 1]]
    if not gaps:
        raise LoadError("no stream got a token after the long prompt arrived")
    return {
        "p95 ITL ms": 1e3 * float(np.percentile(gaps, 95)),
        "longest ITL ms": 1e3 * max(gaps),
        "median ITL before ms": 1e3 * statistics.median(before),
        "TTFT of the prompt ms": 1e3 * ttft(record),
    }


async def _send(target: Target, request: LoadRequest, record: RequestRecord) -> None:
    await send(target.client, request, target.options, record)


async def shared_prefix(target: Target, n_prefix: int, n: int, clients: int) -> Figures:
    """Prompts of equal lengths, first each with a beginning of its own, then all with the same."""
    own = target.prompts(RandomWorkload(n_prefix + 32, 8), n + 1, seed=3)
    shared = target.prompts(RandomWorkload(32, 8, prefix_len=n_prefix), n + 1, seed=4)
    medians = []
    for requests in (own, shared):
        await target.warm_up(requests[:1])
        result = await run_load(
            target.client, requests[1:], target.options, max_concurrency=clients, time_limit=target.time_limit
        )
        check(result.records)
        medians.append(1e3 * statistics.median(ttft(record) for record in result.records))
    without, reused = medians
    return {"TTFT without reuse ms": without, "TTFT with reuse ms": reused, "without / with": without / reused}


def check(records: Sequence[RequestRecord]) -> None:
    """LoadError that names the first failure, if there is one."""
    failed = [record for record in records if not record.is_ok]
    if failed:
        raise LoadError(f"{len(failed)} of {len(records)} requests failed: {failed[0].error}")
