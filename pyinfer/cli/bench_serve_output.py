"""What `pyinfer bench-serve` shows: a bar while it runs, and its figures as text or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pyinfer.cli.console import print_facts, print_table
from pyinfer.cli.text import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

    from pyinfer.loadgen.metrics import Summary
    from pyinfer.loadgen.openai_stream import RequestRecord
    from pyinfer.loadgen.runner import RunResult

METRICS = ("ttft", "tpot", "itl", "e2el")
_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token after it",
    "itl": "inter-token latency",
    "e2el": "end to end",
}
_N_ERRORS = 5  # kinds of errors that are shown


class RequestBar:
    """Requests done, failed, and the rate, on stderr: a bar on a terminal, elsewhere a line every tenth of the way."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._failed, self._n_tokens = total, 0, 0, 0
        self._start = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> RequestBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._bar.start()
            self._bar.add_task("warm-up", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self) -> None:
        """The warm-up is over."""
        self._start = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], description="")

    def add(self, record: RequestRecord) -> None:
        """One more request is done."""
        self._done += 1
        self._failed += not record.is_ok
        self._n_tokens += record.n_output if record.is_ok else 0
        text = f"{self._n_tokens / max(time.monotonic() - self._start, 1e-9):.0f} tokens/s"
        if self._failed:
            text += f", {self._failed} failed"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, description=text)
        elif 10 * self._done // self._total > 10 * (self._done - 1) // self._total:
            print(f"{self._done} of {self._total} requests, {text}", file=sys.stderr, flush=True)


class ServeReport:
    """The figures of a run, and what was run."""

    def __init__(
        self, facts: Mapping[str, Any], result: RunResult, percentiles: Sequence[float], limits: Mapping[str, float]
    ) -> None:
        from pyinfer.loadgen.metrics import summarize

        self._facts, self._result, self._percentiles, self._limits = facts, result, percentiles, limits
        self._errors = Counter(record.error for record in result.records if record.error is not None)
        self._summary: Summary = summarize(result.records, result.duration, percentiles=percentiles, limits=limits)

    def print_json(self, *, detailed: bool) -> None:
        """One object with vLLM's keys; `detailed` adds a list of each request's values, in seconds."""
        from pyinfer.loadgen.metrics import itls, ttft

        fields = {**self._facts, **self._summary.as_json(), "errors": dict(self._errors)}
        if detailed:
            done = [record for record in self._result.records if record.is_ok]
            fields |= {
                "input_lens": [record.n_prompt for record in done],
                "output_lens": [record.n_output for record in done],
                "ttfts": [ttft(record) for record in done],
                "itls": [itls(record) for record in done],
            }
        print(json.dumps(fields, indent=2))

    def print_text(self, metrics: Sequence[str]) -> None:
        """Totals, then a line for each metric, then what went wrong."""
        summary, facts = self._summary, self._facts
        goodput = None
        if summary.request_goodput is not None:
            within = ", ".join(f"{name} {limit:g} ms" for name, limit in self._limits.items())
            goodput = f"{summary.request_goodput:.2f} requests/s within {within}"
        print_facts(
            f"{facts['model_id']} at {facts['base_url']}, {facts['dataset']}",
            [
                ("completed", f"{summary.completed} of {facts['num_prompts']} in {summary.duration:.2f} s"),
                ("failed", summary.failed or None),
                ("input", f"{summary.total_input_tokens} tokens, {summary.cached_tokens} of them cached"),
                ("output", f"{summary.total_output_tokens} tokens"),
                ("requests", f"{summary.request_throughput:.2f} /s"),
                ("output throughput", f"{summary.output_throughput:.2f} tokens/s"),
                ("total throughput", f"{summary.total_token_throughput:.2f} tokens/s"),
                ("goodput", goodput),
            ],
        )
        names = ["mean", "median", *(f"p{p:g}" for p in self._percentiles)]
        rows = []
        for metric in metrics:
            values = summary.distributions[metric]
            numbers = [values.mean, values.median, *values.percentiles.values()]
            rows.append([metric.upper(), *(f"{number:.2f}" for number in numbers), _TITLES[metric]])
        print()
        print_table(["ms", *names, "of"], rows, right=names)
        for text, count in self._errors.most_common(_N_ERRORS):
            print(f"{count} failed: {one_line(text)}", file=sys.stderr)
        if len(self._errors) > _N_ERRORS:
            print(f"and {len(self._errors) - _N_ERRORS} other errors; -o json has all", file=sys.stderr)
