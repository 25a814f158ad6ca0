"""A real server over a real socket: in this process, with a tiny random model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from pyinfer.runtime.engine_client import EngineClient
from pyinfer.runtime.loader import LoadedModel, load_model
from pyinfer.server.app import create_app
from pyinfer.server.listener import open_socket, url_of
from pyinfer.server.service import ServedModel, Service


@dataclass
class RunningServer:
    """A server on a thread of the test's process."""

    url: str
    service: Service
    loaded: LoadedModel
    client: EngineClient

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until the engine has nothing to do; fails if that takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.client.stats()
            if stats.running == stats.waiting == 0:
                return
            assert time.monotonic() < deadline, f"the engine is still at work: {stats}"
            time.sleep(0.01)


def serve_on_thread(service: Service, **options: Any) -> tuple[str, Callable[[], None]]:
    """Serve on a thread; returns the URL and what stops it."""
    listener = open_socket("127.0.0.1", 0)
    url = url_of(listener)
    config = uvicorn.Config(create_app(service, **options), log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)

    def stop() -> None:
        server.should_exit = True
        thread.join()

    return url, stop


@pytest.fixture(scope="session")
def start_server() -> Callable[..., tuple[str, Callable[[], None]]]:
    """`start_server(service, **options of create_app)` -> the URL, and what stops the server."""
    return serve_on_thread


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    from tiny_models import write_tiny_model

    path: Path = write_tiny_model(tmp_path_factory.mktemp("served") / "tiny.gguf")
    with load_model(path, n_threads=1, kv_cache_memory=4 << 20) as loaded:
        client = EngineClient.in_process(loaded.engine)
        service = Service(["tiny"])
        service.set_ready(
            ServedModel(
                client=client,
                tokenizer=loaded.tokenizer,
                template=loaded.chat_template,
                n_ctx=loaded.n_ctx,
                n_ctx_train=512,
                chat_defaults=loaded.chat_params,
                path=str(path),
            )
        )
        url, stop = serve_on_thread(service)
        yield RunningServer(url, service, loaded, client)
        stop()
        client.close()
