"""Many clients: each gets what it gets alone; those that leave take nothing with them."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.server


def body_of(number: int) -> dict[str, Any]:
    """Requests that share a beginning, differ in length and sample."""
    words = " ".join(["the sea", "a bone", "tin"][: number % 3 + 1] * (number % 4 + 1))
    return {
        "model": "tiny", "messages": [{"role": "user", "content": words}], "max_tokens": 12 + 3 * number,
        "seed": number, "ignore_eos": True, "temperature": 0.0 if number % 4 == 0 else 1.0,
    }  # fmt: skip


def stream_text(server: Any, body: dict[str, Any]) -> str:
    fields = {key: body[key] for key in ("model", "messages", "max_tokens", "seed", "temperature")}
    extra = {"ignore_eos": True}
    chunks = server.openai.chat.completions.create(stream=True, extra_body=extra, **fields)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_eight_streams_at_once_equal_each_alone(server: Any) -> None:
    bodies = [body_of(number) for number in range(8)]
    alone = [stream_text(server, body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: stream_text(server, body), bodies))
    assert together == alone


def test_two_hundred_disconnects_leave_nothing_behind(server: Any) -> None:
    """Streams and whole replies, left before, during and at the end; the books of the engine balance afterwards."""
    rng = random.Random(5)
    plans = [(rng.random() < 0.6, rng.randrange(3), rng.uniform(0, 0.08), rng.randrange(8)) for _ in range(200)]
    lock, left = threading.Lock(), [0]

    def leave(plan: tuple[bool, int, float, int]) -> None:
        streaming, n_reads, patience, number = plan
        body = {**body_of(number), "max_tokens": 400, "stream": streaming, "n": 1 + number % 2}
        timeout = httpx.Timeout(30, read=30 if streaming else patience + 0.001)
        with httpx.Client(timeout=timeout) as client:
            try:
                with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply:
                    for _, _ in zip(range(n_reads), reply.iter_raw(64), strict=False):
                        pass
            except httpx.ReadTimeout:
                pass
        with lock:
            left[0] += 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, plans))
    assert left[0] == 200
    server.wait_idle()
    server.loaded.engine.check()
    server.loaded.engine.scheduler.pool.check()
    assert server.client.stats().pages_used == 0
    assert httpx.get(f"{server.url}/stats").json()["pages_used"] == 0
    assert stream_text(server, body_of(3)) == stream_text(server, body_of(3)) != ""


def test_an_engine_failure_ends_its_request_and_no_other(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first token it is a 500; in a stream it is an event, and the stream ends as streams do."""
    engine = server.loaded.engine
    run = engine._stage.run
    steps_left: list[int] = []  # until the stage fails; empty: it does not

    class FailingStage:
        def run(self, batch: Any) -> Any:
            if steps_left:
                steps_left[0] -= 1
                if steps_left[0] == 0:
                    steps_left.clear()
                    raise ValueError("a broken stage")
            return run(batch)

    monkeypatch.setattr(engine, "_stage", FailingStage())
    steps_left.append(1)
    reply = server.post("/v1/chat/completions", body_of(1))
    assert reply.status_code == 500 and "a broken stage" in reply.json()["error"]["message"]
    steps_left.append(5)
    reply = server.post("/v1/chat/completions", {**body_of(2), "stream": True})
    events = [line for line in reply.text.split("\n") if line]
    assert reply.status_code == 200 and len(events) > 4
    assert events[-1] == "data: [DONE]" and '"server_error"' in events[-2]
    assert stream_text(server, body_of(1))
    server.wait_idle()
    engine.check()
