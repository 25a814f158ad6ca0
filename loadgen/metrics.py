"""From request records to figures, as vLLM's benchmark_serving defines and names them.

TTFT: from just before the connection is opened to the first chunk with text. E2EL: to the last chunk. TPOT:
(E2EL - TTFT) / (output tokens - 1), of answers of at least two tokens. ITL: between two successive chunks with text,
all requests together. Throughput: over the whole run, from its first arrival to its last answer. Goodput: completed
requests a second that keep every stated limit. Failed requests count in none of them but in `failed`.
Percentiles interpolate linearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pyinfer.errors import ConfigError
from pyinfer.loadgen.openai_stream import RequestRecord

METRICS = ("ttft", "tpot", "itl", "e2el")
_SLO_METRICS = ("ttft", "tpot", "e2el")


def ttft(record: RequestRecord) -> float:
    """Seconds to the first chunk."""
    return record.chunk_times[0] - record.start


def e2el(record: RequestRecord) -> float:
    """Seconds to the last chunk."""
    return record.end - record.start


def tpot(record: RequestRecord) -> float | None:
    """Seconds an output token after the first; None for an answer of one token."""
    return (e2el(record) - ttft(record)) / (record.n_output - 1) if record.n_output > 1 else None


def itls(record: RequestRecord) -> list[float]:
    """Seconds between successive chunks."""
    return [b - a for a, b in pairwise(record.chunk_times)]


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """{'ttft': 200.0} of ['ttft:200']; several in one text may be parted by spaces. Milliseconds."""
    limits: dict[str, float] = {}
    for item in " ".join(items).split():
        name, _, number = item.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if name not in _SLO_METRICS or not value > 0:
            raise ConfigError(f"{item!r} is not METRIC:MILLISECONDS with a metric of {', '.join(_SLO_METRICS)}")
        if name in limits:
            raise ConfigError(f"{name} is given twice")
        limits[name] = value
    return limits


def keeps(record: RequestRecord, limits: Mapping[str, float]) -> bool:
    """Whether a completed request stays within all limits (ms); an answer of one token has a TPOT of 0."""
    seconds = {"ttft": ttft(record), "tpot": tpot(record) or 0.0, "e2el": e2el(record)}
    return all(1e3 * seconds[name] <= limit for name, limit in limits.items())


@dataclass(frozen=True)
class Distribution:
    """Mean, median, deviation and percentiles of one metric, in milliseconds; zeros if there are no values."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Distribution:
        values = 1e3 * np.asarray(seconds if len(seconds) else [0.0])
        points = {p: float(np.percentile(values, p)) for p in percentiles}
        return cls(float(values.mean()), float(np.median(values)), float(values.std()), points)


@dataclass(frozen=True)
class Summary:
    """The figures of one run; `duration` in seconds, throughputs a second."""

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    cached_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    distributions: dict[str, Distribution]  # by the names of METRICS

    def as_json(self) -> dict[str, Any]:
        """Under vLLM's keys: `mean_ttft_ms`, `p99_ttft_ms` and so on."""
        fields: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "cached_tokens": self.cached_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
        }
        for name, values in self.distributions.items():
            fields |= {f"mean_{name}_ms": values.mean, f"median_{name}_ms": values.median, f"std_{name}_ms": values.std}
            fields |= {f"p{p:g}_{name}_ms": value for p, value in values.percentiles.items()}
        return fields


def summarize(
    records: Sequence[RequestRecord],
    duration: float,
    *,
    percentiles: Sequence[float] = (95.0, 99.0),
    limits: Mapping[str, float] | None = None,
) -> Summary:
    """The figures of a run of `duration` seconds."""
    done = [record for record in records if record.is_ok]
    n_output = sum(record.n_output for record in done)
    n_input = sum(record.n_prompt for record in done)
    seconds = {
        "ttft": [ttft(record) for record in done],
        "tpot": [value for record in done if (value := tpot(record)) is not None],
        "itl": [value for record in done for value in itls(record)],
        "e2el": [e2el(record) for record in done],
    }
    rate = 1 / duration if duration > 0 else 0.0
    return Summary(
        duration=duration,
        completed=len(done),
        failed=len(records) - len(done),
        total_input_tokens=n_input,
        total_output_tokens=n_output,
        cached_tokens=sum(record.n_cached for record in done),
        request_throughput=len(done) * rate,
        request_goodput=sum(keeps(record, limits) for record in done) * rate if limits else None,
        output_throughput=n_output * rate,
        total_token_throughput=(n_input + n_output) * rate,
        distributions={name: Distribution.of(seconds[name], percentiles) for name in METRICS},
    )
