"""`serve` while its engine dies: clients see a pause; what cannot go on says so and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serve_process import serving

pytestmark = [pytest.mark.server, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

N_STREAMS = 16


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import TinyShape, write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", shape=TinyShape(n_ctx=2048))


def body_of(number: int, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "the sea " * (number + 1)}], "stream": True, "seed": number,
        "max_tokens": max_tokens + 10 * number, "ignore_eos": True, "temperature": number % 3, "n": 1 + number % 2,
    }  # fmt: skip


class Streams:
    """Sixteen at once; how far they are, and their texts by choice."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.n_events = 0
        self.ids: list[str] = []
        self._url = url
        self._max_tokens = max_tokens
        self._lock = threading.Lock()

    def run(self, number: int) -> tuple[list[str], list[str]]:
        body = body_of(number, self._max_tokens)
        texts, reasons, last = [""] * body["n"], [""] * body["n"], ""
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=body, timeout=90) as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                last = line or last
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "choices" in event, line
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                    reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
                with self._lock:
                    self.n_events += 1
                    self.ids.append(event["id"])
        assert last == "data: [DONE]"
        return texts, reasons

    def run_all(self, pool: ThreadPoolExecutor) -> list[Any]:
        return [pool.submit(self.run, number) for number in range(N_STREAMS)]


def engine_of(server: int) -> psutil.Process:
    (engine,) = psutil.Process(server).children()
    return engine


def crash(model: Path, n_kills: int, max_tokens: int) -> None:
    with serving(model) as (process, url), ThreadPoolExecutor(N_STREAMS) as pool:
        quiet = Streams(url, max_tokens)
        expected = [each.result() for each in quiet.run_all(pool)]
        assert all(reason == "length" for _, reasons in expected for reason in reasons)
        streams = Streams(url, max_tokens)
        results = streams.run_all(pool)
        states = set()
        for kill in range(1, n_kills + 1):
            target = streams.n_events + quiet.n_events // (8 * n_kills)
            while streams.n_events < target:
                assert not all(each.done() for each in results), f"the streams ended before kill {kill}"
                time.sleep(0.002)
            engine_of(process.pid).kill()
            deadline = time.monotonic() + 30
            is_noticed, state = False, (0, None)
            while not is_noticed or state != (200, None):
                reply = httpx.get(f"{url}/health")
                states.add(state := (reply.status_code, reply.json().get("error", {}).get("code")))
                restarts = f'engine_restarts_total{{model_name="tiny"}} {kill}.0'
                is_noticed = is_noticed or restarts in httpx.get(f"{url}/metrics").text
                assert time.monotonic() < deadline
        assert [each.result() for each in results] == expected
        assert states <= {(200, None), (503, "engine_restarting")}
        timelines = [httpx.get(f"{url}/v1/requests/{each}/timeline").json() for each in set(streams.ids)]
        deaths = [[event["event"] for event in each["events"]].count("engine_died") for each in timelines]
        assert 0 < max(deaths) <= n_kills  # some streams end before a kill or come after it
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_streams_go_on_in_a_new_engine(model_file: Path) -> None:
    crash(model_file, 1, 150)


@pytest.mark.large
def test_streams_go_on_after_ten_kills(model_file: Path) -> None:
    crash(model_file, 10, 1500)


def test_server_ends_when_there_can_be_no_engine(model_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "gone.gguf"
    model.write_bytes(model_file.read_bytes())
    code = (
        "import sys, pyinfer.runtime.engine_process as process; process._BACKOFF = (0.0,)\n"
        "from pyinfer.cli.entry import run; sys.exit(run(sys.argv[1:]))"
    )
    with serving(model, program=[sys.executable, "-c", code]) as (process, _):
        model.unlink()
        engine_of(process.pid).kill()
        assert process.wait(timeout=30) == 1
        output = process.stdout.read() if process.stdout else ""
        last = output.strip().splitlines()[-1]
        assert last.startswith("pyinfer: error: the engine died 2 times in a row") and "restart" in last
        assert "gone.gguf" in output and "Traceback" not in output


def test_engine_does_not_outlive_a_killed_server(model_file: Path) -> None:
    with serving(model_file) as (process, _):
        engine = engine_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs([engine], timeout=10)
        assert not alive


def test_in_process(model_file: Path) -> None:
    with serving(model_file, "--in-process") as (process, url):
        assert not psutil.Process(process.pid).children()
        with contextlib.closing(httpx.Client(timeout=60)) as client:
            reply = client.post(f"{url}/v1/completions", json={"prompt": "the", "ignore_eos": True})
        assert reply.json()["usage"]["completion_tokens"] == 16
