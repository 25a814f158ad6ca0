"""What the API process adds to each token: from the end of the engine's step to the client's socket.

    python benchmarks/api_overhead.py --model smollm2 --streams 32 --tokens 200

One run of `pyinfer serve -t 1` streams to N clients at once. Each client notes when an event with a token arrives; the
server's timelines say when the engine's step that made the token ended. Both are `time.monotonic` of one machine, so
their difference is what the API process, both sockets and this program's own reading add. Also shown: the time between
tokens as the client sees it, less the same between the engine's steps, and the processor's time that the API process
takes for a token, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import socket
import statistics
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from machine_state import describe_machine
from serving_process import RunningServer, own_server, running

_SECONDS = 300.0  # after which a run is given up
_HEALTH_SECONDS = 20.0


class _Stream:
    """One streamed completion over a socket of its own; reads without decoding, to disturb little."""

    def __init__(self, host: str, port: int, number: int, tokens: int) -> None:
        body = json.dumps({
            "prompt": f"Story number {number}:", "max_tokens": tokens, "stream": True, "ignore_eos": True,
            "temperature": 0, "logprobs": 0,
        }).encode()  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket = socket.create_connection((host, port))
        self.socket.sendall(head.encode() + body)
        self.socket.setblocking(False)
        self.parts: list[tuple[float, bytes]] = []
        self.is_done = False

    def read(self) -> None:
        data = self.socket.recv(65536)
        self.parts.append((time.monotonic(), data))
        self.is_done = not data or b"data: [DONE]" in data

    def tokens(self) -> tuple[str, list[float]]:
        """The request's id and when each of its tokens arrived."""
        text, times, request_id = b"", list[float](), ""
        for at, data in self.parts:
            text += data
            *events, text = text.split(b"\n\n")
            for event in events:
                start = event.find(b"data: {")
                if start >= 0:
                    fields = json.loads(event[start + 6 :])
                    request_id = fields["id"]
                    times += [at] * len(fields["choices"][0]["logprobs"]["tokens"])
        return request_id, times


def stream_all(url: str, streams: int, tokens: int) -> list[tuple[str, list[float]]]:
    address = urlsplit(url)
    assert address.hostname is not None and address.port is not None
    with selectors.DefaultSelector() as selector:
        for number in range(streams):
            stream = _Stream(address.hostname, address.port, number, tokens)
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        opened: list[_Stream] = [key.data for key in selector.get_map().values()]
        left, deadline = streams, time.monotonic() + _SECONDS
        while left:
            if time.monotonic() > deadline:
                sys.exit(f"{left} of {streams} streams did not end within {_SECONDS:.0f} s")
            for key, _ in selector.select(1.0):
                key.data.read()
                if key.data.is_done:
                    selector.unregister(key.data.socket)
                    key.data.socket.close()
                    left -= 1
    return [stream.tokens() for stream in opened]


def engine_times(url: str, request_id: str) -> list[float]:
    with urllib.request.urlopen(f"{url}/v1/requests/{request_id}/timeline", timeout=30) as reply:
        line = json.load(reply)
    return [line["arrival_monotonic"] + at for at in line["samples"][0]["token_times"]]


def percentiles(values: list[float]) -> str:
    cuts = statistics.quantiles(values, n=100)
    return "  ".join(f"p{p} {1000 * cuts[p - 1]:8.3f}" for p in (5, 50, 90, 99))


def measure(url: RunningServer, streams: int, tokens: int) -> None:
    delays: list[float] = []
    differences: list[float] = []
    steps: list[float] = []
    before = url.cpu_seconds()
    results = stream_all(url, streams, tokens)
    cpu = (url.cpu_seconds() - before) / (streams * tokens)
    for request_id, arrived in results:
        made = engine_times(url, request_id)
        if len(made) != len(arrived):
            sys.exit(f"request {request_id} has {len(made)} tokens, and {len(arrived)} arrived")
        delays += [a - b for a, b in zip(arrived, made, strict=True)]
        between = [b - a for a, b in pairwise(made)]
        steps += between
        differences += [b - a - c for (a, b), c in zip(pairwise(arrived), between, strict=True)]
    print(f"{streams:3} streams, ms   engine, between tokens  {percentiles(steps)}")
    print(f"                  step's end to client    {percentiles(delays)}")
    print(f"                  client less engine      {percentiles(differences)}")
    print(f"                  API process, CPU time of a token {1e6 * cpu:.1f} us", flush=True)


def measure_health(url: str, n_tokens: int) -> None:
    """How long /health takes while a prompt of so many tokens is read; the request is left before it ends."""
    address = urlsplit(url)
    assert address.hostname is not None and address.port is not None
    body = json.dumps({"prompt": [1 + i % 200 for i in range(n_tokens)], "max_tokens": 1, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    seconds: list[float] = []
    with socket.create_connection((address.hostname, address.port)) as request:
        request.sendall(head.encode() + body)
        request.setblocking(False)
        start = time.monotonic()
        while time.monotonic() - start < _HEALTH_SECONDS:
            before = time.monotonic()
            with urllib.request.urlopen(f"{url}/health", timeout=30):
                seconds.append(time.monotonic() - before)
            time.sleep(0.02)
            with contextlib.suppress(BlockingIOError):
                if request.recv(1):
                    break
        read = time.monotonic() - start
    print(f"/health while {n_tokens} tokens are read, ms (n={len(seconds)}, over {read:.1f} s)")
    print(
        f"                                          {percentiles(seconds)}  most {1000 * max(seconds):8.3f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--long-prompt", type=int, default=0, metavar="N", help="also time /health while N are read")
    parser.add_argument("-t", "--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(describe_machine())
    with running(own_server(arguments.threads), Path(arguments.model), 0) as url:
        stream_all(url, 2, 8)
        for streams in arguments.streams:
            measure(url, streams, arguments.tokens)
        if arguments.long_prompt:
            measure_health(url, arguments.long_prompt)


if __name__ == "__main__":
    main()
