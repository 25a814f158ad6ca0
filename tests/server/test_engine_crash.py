"""`serve` while its engine dies: clients see a pause; what cannot go on says so and ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from dying_engine import HANG_WITH_LOCK, Death, deadly
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


Answer = tuple[str, list[str], list[str]]  # id, texts, finish reasons


def stream(url: str, number: int, max_tokens: int) -> Answer:
    body = body_of(number, max_tokens)
    texts, reasons, last, request_id = [""] * body["n"], [""] * body["n"], "", ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=90) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            last = line or last
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "choices" in event, line
            request_id = event["id"]
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert last == "data: [DONE]"
    return request_id, texts, reasons


def engine_of(server: int) -> psutil.Process:
    (engine,) = psutil.Process(server).children()
    return engine


def crash(model: Path, program: list[str], n_kills: int, max_tokens: int) -> None:
    with serving(model, program=program) as (process, url), ThreadPoolExecutor(N_STREAMS) as pool:
        streams = [pool.submit(stream, url, number, max_tokens) for number in range(N_STREAMS)]
        states = set()
        restarts = f'engine_restarts_total{{model_name="tiny"}} {n_kills}.0'
        deadline = time.monotonic() + 60 + 10 * n_kills
        while restarts not in httpx.get(f"{url}/metrics").text or (200, None) not in states:
            reply = httpx.get(f"{url}/health")
            states.add((reply.status_code, reply.json().get("error", {}).get("code")))
            assert time.monotonic() < deadline
            time.sleep(0.005)
        answers = [each.result() for each in streams]
        assert states <= {(200, None), (503, "engine_restarting")}
        for request_id, _, reasons in answers:
            assert set(reasons) == {"length"}
            timeline = httpx.get(f"{url}/v1/requests/{request_id}/timeline").json()
            assert [event["event"] for event in timeline["events"]].count("engine_died") == n_kills
        quiet = [pool.submit(stream, url, number, max_tokens) for number in range(N_STREAMS)]
        assert [each.result()[1:] for each in quiet] == [answer[1:] for answer in answers]
        assert restarts in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def kills(n: int) -> list[Death]:
    """Each when all samples have some tokens and want more, at any moment of a step."""
    rng = random.Random(n)
    return [Death(n_tokens=5 * N_STREAMS * 3 // 2, delay=rng.uniform(0, 0.005)) for _ in range(n)]


def test_streams_go_on_in_a_new_engine(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = deadly(monkeypatch, tmp_path / "lives", kills(2), N_STREAMS)
    crash(model_file, program, 2, 150)


@pytest.mark.large
def test_streams_go_on_after_ten_kills(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = deadly(monkeypatch, tmp_path / "lives", kills(10), N_STREAMS)
    crash(model_file, program, 10, 300)


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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread notices, which needs the interpreter's lock")
def test_engine_that_hangs_does_not_outlive_a_killed_server(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = deadly(monkeypatch, tmp_path / "lives", [Death(5, HANG_WITH_LOCK)])
    with serving(model_file, program=program) as (process, url), ThreadPoolExecutor(1) as pool:
        engine = engine_of(process.pid)
        answer = pool.submit(stream, url, 0, 100)
        while not (tmp_path / "lives.hung").exists():
            assert not answer.done()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs([engine], timeout=10)
        assert not alive
        assert isinstance(answer.exception(), httpx.HTTPError)


def test_in_process(model_file: Path) -> None:
    with serving(model_file, "--in-process") as (process, url):
        assert not psutil.Process(process.pid).children()
        with contextlib.closing(httpx.Client(timeout=60)) as client:
            reply = client.post(f"{url}/v1/completions", json={"prompt": "the", "ignore_eos": True})
        assert reply.json()["usage"]["completion_tokens"] == 16
