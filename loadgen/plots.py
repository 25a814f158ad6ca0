"""Plots of a run: how TTFT, TPOT and ITL are distributed, and what each request did when. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pyinfer.errors import ConfigError
from pyinfer.loadgen.metrics import e2el, itls, tpot, ttft
from pyinfer.loadgen.openai_stream import RequestRecord


def check_plot(path: Path) -> None:
    """ConfigError before a run if its plot could not be written after it."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'pyinfer-gguf[plots]'", param="plot"
        )
    kinds = ("eps", "jpg", "pdf", "png", "svg")
    if path.suffix.lower().lstrip(".") not in kinds:
        raise ConfigError(f"--plot {path}: the name must end in one of {', '.join(kinds)}", param="plot")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}", param="plot")


def plot_run(path: Path, title: str, records: Sequence[RequestRecord]) -> None:
    """Write the figure to `path`, in the format of its suffix."""
    check_plot(path)
    from matplotlib.figure import Figure

    done = [record for record in records if record.is_ok]
    figure: Any = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    _cumulative(
        axes[0, 0], "since the request was sent, s", {"TTFT": [ttft(r) for r in done], "E2EL": [e2el(r) for r in done]}
    )
    gaps = {
        "TPOT": [1e3 * v for r in done if (v := tpot(r)) is not None],
        "ITL": [1e3 * v for r in done for v in itls(r)],
    }
    _cumulative(axes[0, 1], "between tokens, ms", gaps)
    _timeline(axes[1, 0], done)
    _rate(axes[1, 1], done)
    figure.savefig(path, dpi=120)


def _cumulative(axes: Any, label: str, series: dict[str, list[float]]) -> None:
    for name, values in series.items():
        if values:
            axes.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", label=name)
    axes.set(xlabel=label, ylabel="share", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()


def _timeline(axes: Any, done: Sequence[RequestRecord]) -> None:
    begin = min((r.start for r in done), default=0.0)
    rows = range(len(done))
    axes.barh(
        rows, [ttft(r) for r in done], left=[r.start - begin for r in done], label="waiting and prompt", height=0.9
    )
    axes.barh(
        rows,
        [e2el(r) - ttft(r) for r in done],
        left=[r.chunk_times[0] - begin for r in done],
        label="answer",
        height=0.9,
    )
    axes.set(xlabel="s", ylabel="request")
    axes.invert_yaxis()
    axes.legend()


def _rate(axes: Any, done: Sequence[RequestRecord]) -> None:
    begin = min((r.start for r in done), default=0.0)
    times = np.array([t - begin for r in done for t in r.chunk_times])
    if len(times):
        counts, edges = np.histogram(times, bins=np.linspace(0, max(times.max(), 1e-3), 61))
        axes.step(edges[:-1], counts / np.diff(edges), where="post")
    axes.set(xlabel="s", ylabel="chunks a second", ylim=(0, None))
    axes.grid(alpha=0.3)
