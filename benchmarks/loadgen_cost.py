"""What the load generator itself costs: CPU time a streamed chunk, against httpx and the openai package.

    python benchmarks/loadgen_cost.py --streams 32 --tokens 400

A server that only writes prepared chunks, in a process of its own, streams to N clients at once, one chunk to each
every few milliseconds, as an engine does. Each client library reads the same streams and notes the time of every chunk.
The CPU time is what a generator takes from the server that it shares a machine with; it is not wall time, so other
processes hardly move it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from pyinfer.loadgen.http_client import HttpClient
from pyinfer.loadgen.openai_stream import LoadRequest, SendOptions
from pyinfer.loadgen.runner import run_load

_SECONDS = 120.0  # after which a measurement gives up
Reader = Callable[[str, int, int], Awaitable[int]]  # URL, streams, tokens -> chunks seen


async def serve(tokens: int, step: float) -> None:
    """Answers every request with so many chunks, one every `step` seconds; prints its port; ends with stdin."""
    choice = {"index": 0, "text": " token", "logprobs": None, "finish_reason": None}
    event = {"id": "cmpl-0123456789", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    data = f"data: {json.dumps(event)}\n\n".encode()
    chunk = b"%x\r\n%s\r\n" % (len(data), data)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(head)
        for _ in range(tokens):
            writer.write(chunk)
            await asyncio.sleep(step)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def read_own(url: str, streams: int, tokens: int) -> int:
    requests = [LoadRequest("x", 1, tokens)] * streams
    result = await run_load(HttpClient(url), requests, SendOptions("m"), time_limit=_SECONDS)
    return sum(len(record.chunk_times) for record in result.records)


async def read_httpx(url: str, streams: int, tokens: int) -> int:
    import httpx

    async def one(client: httpx.AsyncClient) -> int:
        times = []
        body = {"model": "m", "prompt": "x", "max_tokens": tokens, "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    times.append(time.perf_counter())
        return len(times)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=_SECONDS, limits=limits, trust_env=False) as client:
        return sum(await asyncio.gather(*(one(client) for _ in range(streams))))


async def read_openai(url: str, streams: int, tokens: int) -> int:
    import openai

    async def one(client: openai.AsyncOpenAI) -> int:
        times = []
        stream = await client.completions.create(model="m", prompt="x", max_tokens=tokens, stream=True)
        async for event in stream:
            if event.choices[0].text:
                times.append(time.perf_counter())
        return len(times)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=_SECONDS) as client:
        return sum(await asyncio.gather(*(one(client) for _ in range(streams))))


READERS: dict[str, Reader] = {"pyinfer.loadgen": read_own, "httpx": read_httpx, "openai": read_openai}


def measure(name: str, url: str, streams: int, tokens: int) -> None:
    try:
        asyncio.run(_limited(READERS[name], url, 1, 1))  # imports and first connections
    except ImportError:
        print(f"| {name} | not installed | | | |")
        return
    wall, cpu = time.perf_counter(), time.process_time()
    chunks = asyncio.run(_limited(READERS[name], url, streams, tokens))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"| {name} | {chunks} | {chunks / wall:.0f} | {1e6 * cpu / chunks:.1f} | {100 * cpu / wall:.1f} % |", flush=True
    )


async def _limited(reader: Reader, url: str, streams: int, tokens: int) -> int:
    async with asyncio.timeout(_SECONDS):
        return await reader(url, streams, tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU time of the load generator for a streamed chunk.")
    parser.add_argument("--streams", type=int, default=32, help="requests at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=400, help="chunks of each (default: 400)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="between a stream's chunks (default: 10)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.tokens, 1e-3 * arguments.step_ms))
        return 0
    command = [sys.executable, __file__, "--serve", "--tokens", str(arguments.tokens)]
    command += ["--step-ms", str(arguments.step_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            print("| client | chunks | chunks a second | CPU us a chunk | of a core |\n|---|---:|---:|---:|---:|")
            for name in READERS:
                measure(name, url, arguments.streams, arguments.tokens)
        finally:
            server.stdin.close()
            server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
