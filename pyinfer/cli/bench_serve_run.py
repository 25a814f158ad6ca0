"""One run of `pyinfer bench-serve`: what is sent, by whom tokens are counted, and the load itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pyinfer.cli.bench_serve_output import RequestBar
from pyinfer.cli.progress import terminal_progress
from pyinfer.errors import RequestError
from pyinfer.loadgen.http_client import HttpClient, StatusError
from pyinfer.loadgen.http_reader import HttpError
from pyinfer.loadgen.openai_stream import Endpoint, LoadRequest, RequestRecord, SendOptions
from pyinfer.loadgen.runner import RunResult, run_load, warm_up
from pyinfer.loadgen.sharegpt import read_exchanges, sharegpt_file
from pyinfer.loadgen.tokens import LocalTokenizer, ServerTokenizer, Tokenizer
from pyinfer.loadgen.workload import RandomWorkload, conversation_requests, random_requests
from pyinfer.runtime.hub import resolve
from pyinfer.runtime.tokenizer import load_tokenizer

_SHORT = 10.0  # seconds in which a server can name its models


@dataclass(frozen=True)
class Work:
    """What the requests are made from."""

    dataset: str
    path: Path | None
    input_len: int
    output_len: int | None
    range_ratio: float
    prefix_len: int | None
    n_prefixes: int


async def make_requests(work: Work, n: int, tokenizer: Tokenizer, endpoint: Endpoint, seed: int) -> list[LoadRequest]:
    """n requests of the workload, the warm-up's included."""
    if work.dataset == "sharegpt":
        exchanges = read_exchanges(work.path or sharegpt_file(terminal_progress()))
        return await conversation_requests(exchanges, n, tokenizer, seed, output_len=work.output_len)
    prefix_len = (work.prefix_len or 1024) if work.dataset == "shared-prefix" else 0
    workload = RandomWorkload(work.input_len, work.output_len or 128, work.range_ratio, prefix_len, work.n_prefixes)
    return await random_requests(workload, n, tokenizer, endpoint, seed)


def make_tokenizer(reference: str | None, client: HttpClient) -> Tokenizer:
    """That of a GGUF, by its reference; without one the server counts."""
    if reference is None:
        return ServerTokenizer(client)
    return LocalTokenizer(load_tokenizer(resolve(reference, terminal_progress())))


async def first_model(client: HttpClient) -> str:
    """The first name that the server gives a model. RequestError if it does not answer."""
    try:
        async with asyncio.timeout(_SHORT):
            reply = await client.request("GET", "/v1/models")
        name: str = msgspec.convert(msgspec.json.decode(reply)["data"][0]["id"], str)
    except TimeoutError:
        raise RequestError(f"{client.base_url} does not answer within {_SHORT:g} s; is it a server?") from None
    except OSError as error:
        hint = "start one with 'pyinfer serve', or name another with --base-url"
        raise RequestError(f"no server at {client.base_url} ({error.strerror or error}); {hint}") from error
    except (StatusError, HttpError, msgspec.MsgspecError, LookupError, TypeError) as error:
        raise RequestError(f"{client.base_url}/v1/models names no model ({error}); give one with --model") from error
    return name


async def measure(
    client: HttpClient,
    requests: list[LoadRequest],
    n_warmup: int,
    options: SendOptions,
    rate: float,
    max_concurrency: int | None,
    seed: int,
) -> RunResult:
    """Send the last `n_warmup` requests uncounted, then all others; their prompts differ, so they fill no cache."""
    counted = requests[: len(requests) - n_warmup]
    with RequestBar(len(counted)) as bar:
        failure = await warm_up(client, requests[len(counted) :], options)
        if failure is not None:
            raise RequestError(f"the warm-up request failed: {failure.error}")
        bar.start()
        return await run_load(
            client,
            counted,
            options,
            request_rate=rate,
            max_concurrency=max_concurrency,
            seed=seed,
            on_done=bar.add,
        )


async def count_missing(records: list[RequestRecord], tokenizer: Tokenizer) -> None:
    """Tokens of the answers whose server did not say how many there are."""
    for record in records:
        if record.is_ok and not record.n_output:
            record.n_output = len(await tokenizer.encode(record.text, add_special=False))
