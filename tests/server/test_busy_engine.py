"""`serve` while its engine is at work on one long step: the server answers, and clients come and go."""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from dying_engine import HANG_WITH_LOCK, Death, deadly
from serve_process import serving

pytestmark = pytest.mark.server

N_LONG = 6000  # tokens


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import TinyShape, write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", shape=TinyShape(n_ctx=8192))


def test_everything_but_tokens_is_answered_during_a_step(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that never ends stands for the longest there is: nothing here may wait for it."""
    program = deadly(monkeypatch, tmp_path / "lives", [Death(0, HANG_WITH_LOCK if sys.platform == "linux" else 0)])
    with serving(model_file, program=program) as (process, url), httpx.Client(base_url=url, timeout=10) as client:
        body = {"prompt": [1 + i % 200 for i in range(N_LONG)], "max_tokens": 1, "stream": True}
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            while not (tmp_path / "lives.hung").exists():
                time.sleep(0.01)
            for path in ("/health", "/metrics", "/stats", "/v1/models", "/props", "/version", "/"):
                assert client.get(path).status_code == 200, path
            assert client.post("/tokenize", json={"content": "the sea"}).json()["tokens"]
            with pytest.raises(httpx.ReadTimeout):  # queued, and left again
                client.post("/v1/completions", json={"prompt": "the sea"}, timeout=0.2)
            assert client.get("/health").status_code == 200 and not reading.done()
            process.kill()
            assert isinstance(reading.exception(), httpx.TransportError)


def leave(url: str, plan: tuple[bool, int, float, int]) -> None:
    """Ask for a long answer, read a little of it, or wait a little, and go."""
    streaming, n_reads, patience, number = plan
    body = {"prompt": "the sea " * number, "max_tokens": 2000, "ignore_eos": True, "n": number, "stream": streaming}
    timeout = httpx.Timeout(30, read=30 if streaming else patience)
    with httpx.Client(timeout=timeout) as client:
        try:
            with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
                for _ in zip(range(n_reads), reply.iter_raw(64), strict=False):
                    pass
        except httpx.ReadTimeout:
            assert not streaming


def test_64_disconnects_beside_a_long_prompt_leave_nothing_behind(model_file: Path) -> None:
    rng = random.Random(7)
    plans = [(rng.random() < 0.6, rng.randrange(4), rng.uniform(0.001, 0.1), rng.randrange(1, 4)) for _ in range(64)]
    short = {"prompt": "the sea", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    long: dict[str, Any] = {"prompt": [1 + i % 200 for i in range(N_LONG)], "max_tokens": 5, "ignore_eos": True}
    with serving(model_file) as (_, url), ThreadPoolExecutor(17) as pool:
        alone = httpx.post(f"{url}/v1/completions", json=short, timeout=60).json()["choices"][0]["text"]
        reading = pool.submit(httpx.post, f"{url}/v1/completions", json=long, timeout=90)
        list(pool.map(lambda plan: leave(url, plan), plans))
        assert httpx.get(f"{url}/health").status_code == 200
        assert reading.result().json()["usage"]["completion_tokens"] == 5
        deadline = time.monotonic() + 30
        while any((stats := httpx.get(f"{url}/stats").json())[name] for name in ("running", "waiting", "pages_used")):
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)
        again = httpx.post(f"{url}/v1/completions", json=short, timeout=60).json()["choices"][0]["text"]
        assert again == alone != ""
