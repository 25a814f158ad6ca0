"""The load generator's arithmetic against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyinfer.errors import ConfigError
from pyinfer.loadgen.arrivals import arrival_times
from pyinfer.loadgen.metrics import Distribution, e2el, itls, keeps, parse_goodput, summarize, tpot, ttft
from pyinfer.loadgen.openai_stream import RequestRecord

pytestmark = pytest.mark.unit


def record(start: float, chunks: list[float], n_output: int, n_prompt: int = 10) -> RequestRecord:
    return RequestRecord(n_prompt, n_output, start, chunks[-1], chunks)


# first token after 0.5 s, then one after 0.1, 0.2 and 0.3 s: (1.1 - 0.5) / 3 = 0.2 s a token
FOUR = record(10.0, [10.5, 10.6, 10.8, 11.1], n_output=4)
# two tokens in one chunk, as a server sends them when a character spans both
MERGED = record(10.0, [11.0, 11.4], n_output=3)
SINGLE = record(12.0, [12.25], n_output=1)


def test_definitions() -> None:
    assert [ttft(r) for r in (FOUR, MERGED, SINGLE)] == pytest.approx([0.5, 1.0, 0.25])
    assert [e2el(r) for r in (FOUR, MERGED, SINGLE)] == pytest.approx([1.1, 1.4, 0.25])
    assert tpot(FOUR) == pytest.approx(0.2) and tpot(MERGED) == pytest.approx(0.2) and tpot(SINGLE) is None
    assert itls(FOUR) == pytest.approx([0.1, 0.2, 0.3]) and itls(MERGED) == pytest.approx([0.4]) and itls(SINGLE) == []


def test_summary() -> None:
    failed = RequestRecord(10, 0, 10.0, 10.1, error="HTTP 500")
    summary = summarize([FOUR, MERGED, SINGLE, failed], 4.0, percentiles=(50, 99), limits={"ttft": 600, "e2el": 1200})
    assert (summary.completed, summary.failed) == (3, 1)
    assert (summary.total_input_tokens, summary.total_output_tokens) == (30, 8)
    assert summary.request_throughput == 3 / 4 and summary.output_throughput == 2.0
    assert summary.total_token_throughput == 38 / 4
    assert summary.request_goodput == 2 / 4  # MERGED took 1 s to its first token
    assert summary.distributions["ttft"].mean == pytest.approx(1e3 * (0.5 + 1.0 + 0.25) / 3)
    assert summary.distributions["ttft"].median == pytest.approx(500)
    assert summary.distributions["tpot"].mean == pytest.approx(200)  # SINGLE has none
    assert summary.distributions["itl"].median == pytest.approx(250)  # of 100, 200, 300, 400
    # linear between the last two of 0.25, 0.5, 1.0: position 0.99 * 2 = 1.98
    assert summary.distributions["ttft"].percentiles[99] == pytest.approx(500 + 0.98 * 500)
    fields = summary.as_json()
    assert fields["p99_ttft_ms"] == pytest.approx(990) and fields["median_itl_ms"] == pytest.approx(250)
    assert fields["failed"] == 1 and fields["mean_e2el_ms"] == pytest.approx(1e3 * (1.1 + 1.4 + 0.25) / 3)


def test_summary_of_nothing() -> None:
    summary = summarize([RequestRecord(3, error="x")], 1.0, limits={"ttft": 1.0})
    assert (summary.completed, summary.failed, summary.request_goodput, summary.output_throughput) == (0, 1, 0.0, 0.0)
    assert summary.distributions["itl"] == Distribution(0.0, 0.0, 0.0, {95.0: 0.0, 99.0: 0.0})
    assert summarize([FOUR], 1.0).request_goodput is None


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"ttft": 500.1}, True),
        ({"ttft": 499.9}, False),
        ({"tpot": 200.1}, True),
        ({"tpot": 199.9}, False),
        ({"e2el": 1100.1, "tpot": 199.9}, False),
    ],
)
def test_goodput_limits(limits: dict[str, float], kept: bool) -> None:
    assert keeps(FOUR, limits) is kept


def test_single_token_keeps_any_tpot() -> None:
    assert keeps(SINGLE, {"tpot": 0.001})


def test_goodput_texts() -> None:
    assert parse_goodput(["ttft:200", "tpot:30.5 e2el:1e4"]) == {"ttft": 200.0, "tpot": 30.5, "e2el": 10000.0}
    assert parse_goodput([]) == {}
    for text in ("ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "itl:5", "ttft:nan", "ttft:1 ttft:2"):
        with pytest.raises(ConfigError):
            parse_goodput([text])


def test_all_at_once() -> None:
    assert arrival_times(3, math.inf, seed=0) == [0.0, 0.0, 0.0]


def test_poisson_arrivals() -> None:
    """Gaps are exponential, so mean = deviation = 1 / rate; for the arrivals in a second mean = variance."""
    rate, n = 5.0, 20_000
    times = arrival_times(n, rate, seed=1)
    assert times == arrival_times(n, rate, seed=1) != arrival_times(n, rate, seed=2)
    assert times[0] == 0.0 and len(times) == n
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03) and gaps.std() == pytest.approx(1 / rate, rel=0.03)
    assert (gaps > 1 / rate).mean() == pytest.approx(math.exp(-1), abs=0.01)
    counts = np.bincount(np.array(times, int))[:-1]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)
