"""The engine in a process of its own: same chunks as on a thread; killed or hung, its requests go on as if nothing
had been; it never outlives its client."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from dying_engine import HANG, Death, deadly

from pyinfer.errors import ConfigError, EngineError, GGUFError, RequestError, UnavailableError
from pyinfer.runtime import engine_process, engine_wire
from pyinfer.runtime.engine_client import EngineClient
from pyinfer.runtime.engine_process import EngineProcess
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.tokenizer import load_tokenizer

pytestmark = pytest.mark.server

OPTIONS: dict[str, Any] = {"n_threads": 1, "kv_cache_memory": 4 << 20}
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import TinyShape, write_tiny_model

    # so long a context that no answer of that length ends before a word from here arrives
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", shape=TinyShape(n_ctx=8192))


def start(path: Path, **options: Any) -> EngineProcess:
    client = EngineProcess(**options)
    client.load(path, OPTIONS, lambda: load_tokenizer(path))
    return client


@pytest.fixture(scope="module")
def shared(model_file: Path) -> Iterator[EngineProcess]:
    client = start(model_file)
    yield client
    client.close()


Jobs = list[tuple[list[int], SamplingParams]]


def jobs(n: int, max_tokens: int) -> Jobs:
    """Different in everything that keeps a state: seeds, penalties, several samples, prompt logprobs."""
    result: Jobs = []
    for i in range(n):
        params = SamplingParams(
            seed=i if i % 4 else None,
            n=1 + (i % 5 == 1),
            max_tokens=max_tokens - 3 * i,
            ignore_eos=i % 3 != 0,
            temperature=0.0 if i % 4 == 0 else 1.0,
            repetition_penalty=1.1 if i % 2 else 1.0,
            logprobs=1 if i % 3 == 1 else None,
            prompt_logprobs=1 if i % 6 == 1 else None,
            bad_words=["a"] if i % 4 == 2 else None,
        )
        result.append(([10 + i] * (5 + 7 * i), params))
    return result


Result = tuple[list[list[int]], list[Any], list[Any]]


async def collect(client: EngineClient, job: tuple[list[int], SamplingParams]) -> Result:
    """Tokens by sample; logprobs and prompt logprobs; finish reasons."""
    prompt, params = job
    tokens: list[list[int]] = [[] for _ in range(params.n)]
    others: list[Any] = [[] for _ in range(params.n + 1)]
    reasons: list[Any] = [None] * params.n
    async for output in client.generate(prompt, params):
        tokens[output.index] += output.new_token_ids
        others[output.index] += output.new_logprobs or []
        others[-1] += [output.prompt_logprobs] if output.prompt_logprobs else []
        reasons[output.index] = output.finish_reason or reasons[output.index]
    return tokens, others, reasons


async def collect_all(client: EngineClient, work: Jobs) -> list[Result]:
    return list(await asyncio.gather(*(collect(client, job) for job in work)))


def run(test: Callable[[], Awaitable[None]], seconds: float = 60) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), seconds)

    asyncio.run(main())


def undisturbed(path: Path, work: Jobs) -> list[Result]:
    """What an engine on a thread of this process makes of it."""
    with load_model(path, **OPTIONS) as loaded:
        client = EngineClient.in_process(loaded.engine)
        try:
            return asyncio.run(collect_all(client, work))
        finally:
            client.close()


def test_same_as_on_a_thread(shared: EngineProcess, model_file: Path) -> None:
    work = jobs(12, 60)
    assert asyncio.run(collect_all(shared, work)) == undisturbed(model_file, work)
    stats = shared.stats()
    assert stats.requests_finished >= 12 and stats.running == stats.waiting == stats.pages_used == 0


def test_leaving_aborting_and_refusing(shared: EngineProcess) -> None:
    async def test() -> None:
        long = SamplingParams(max_tokens=8000, ignore_eos=True)
        stream = shared.generate([1, 2], long)
        await anext(stream)
        await stream.aclose()
        ends: dict[int, RequestOutput] = {}
        async for output in shared.generate([1], long.replace(n=2), request_id="x"):
            if output.finish_reason is not None:
                ends[output.index] = output
            elif len(ends) < 2:
                shared.abort("x", 1 - len(ends))
        assert [ends[i].finish_reason for i in range(2)] == ["abort", "abort"]
        with pytest.raises(RequestError, match="context"):
            shared.generate([1] * 8192, long)
        while shared.stats().pages_used:
            await asyncio.sleep(0.01)

    run(test)


def test_client_never_imports_numba(model_file: Path) -> None:
    code = (
        "import sys\n"
        "from pyinfer.runtime.engine_process import EngineProcess\n"
        "from pyinfer.runtime.model_edge import load_edge\n"
        "import pyinfer.server.app\n"
        "client = EngineProcess()\n"
        f"client.load({str(model_file)!r}, {OPTIONS!r}, lambda: load_edge({str(model_file)!r}).tokenizer)\n"
        "client.close()\n"
        "sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def kill_under(path: Path, n_kills: int, n_streams: int, max_tokens: int) -> None:
    """`deadly` has planned the kills."""
    work = jobs(n_streams, max_tokens)
    expected = undisturbed(path, work)
    client = start(path)

    async def test() -> None:
        assert await collect_all(client, work) == expected

    try:
        run(test, 60 + 20 * n_kills)
        assert client.n_restarts == n_kills and client.is_alive
        stats = client.stats()
        assert stats.requests_finished >= n_streams and stats.running == stats.pages_used == 0
    finally:
        client.close()


def kills(n: int) -> list[Death]:
    rng = random.Random(n)
    return [Death(rng.randrange(1, 200), delay=rng.uniform(0, 0.005)) for _ in range(n)]


def test_killed_engine_leaves_16_streams_whole(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly(monkeypatch, tmp_path / "lives", kills(2), 16)
    kill_under(model_file, 2, 16, 300)


@pytest.mark.large
def test_engine_killed_ten_times_under_16_streams(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly(monkeypatch, tmp_path / "lives", kills(10), 16)
    kill_under(model_file, 10, 16, 300)


def test_hung_engine_is_replaced(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = jobs(4, 200)
    expected = undisturbed(model_file, work)
    deadly(monkeypatch, tmp_path / "lives", [Death(40, HANG)], len(work))
    client = start(model_file, hang_seconds=2.0)

    async def test() -> None:
        assert await collect_all(client, work) == expected

    try:
        run(test)
        assert client.n_restarts == 1
        time.sleep(2.5)  # an engine that has nothing to do may be silent
        assert client.is_ready and client.n_restarts == 1
    finally:
        client.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_request_that_kills_engines_is_given_up_and_no_other(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deaths before a request's first token count against it; what arrives later is served."""
    deadly(monkeypatch, tmp_path / "lives", [Death(0, signal.SIGSEGV)] * 3)
    client = start(model_file)

    async def test() -> None:
        with pytest.raises(EngineError, match="3 times"):
            await collect(client, ([1], SamplingParams()))
        tokens, _, reasons = await collect(client, ([1], SamplingParams(ignore_eos=True)))
        assert (len(tokens[0]), reasons) == (16, ["length"])

    try:
        run(test)
        assert client.n_restarts == 3
    finally:
        client.close()


def test_given_up_after_deaths_in_a_row(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "_BACKOFF", (0.0,) * 3)
    path = tmp_path / "gone.gguf"
    path.write_bytes(model_file.read_bytes())
    deadly(monkeypatch, tmp_path / "lives", [Death(0)])
    client = start(path)
    failures: list[str] = []
    client.on_failure = failures.append

    async def test() -> None:
        path.unlink()
        stream = client.generate([1], SamplingParams(max_tokens=400, ignore_eos=True))
        with pytest.raises(UnavailableError, match="4 times in a row"):
            async for _ in stream:
                pass
        assert not client.is_alive
        with pytest.raises(UnavailableError, match="restart"):
            client.generate([1])

    try:
        run(test)
        deadline = time.monotonic() + 20
        while not failures and time.monotonic() < deadline:  # told after the streams, by the thread that watches
            time.sleep(0.01)
        assert len(failures) == 1 and "4 times in a row" in failures[0]
    finally:
        client.close()


def test_what_cannot_be_loaded_is_the_engines_own_error(model_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    client = EngineProcess()
    with pytest.raises(GGUFError, match=r"broken\.gguf"):
        client.load(broken, OPTIONS, lambda: load_tokenizer(model_file))
    assert not psutil.pid_exists(client.pid)
    client = EngineProcess()
    with pytest.raises(GGUFError):
        client.load(model_file, OPTIONS, lambda: load_tokenizer(broken))
    assert not psutil.pid_exists(client.pid)
    client = EngineProcess()
    with pytest.raises(ConfigError, match="n_ctx is 100000"):  # the kinds cross over by name
        client.load(model_file, {**OPTIONS, "n_ctx": 100000}, lambda: load_tokenizer(model_file))


def test_loopback_where_there_are_no_unix_sockets(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "private_folder", lambda: None)
    client = start(model_file)
    try:
        assert client._wire is not None and client._wire.address.requests.startswith("tcp://127.0.0.1:")
        assert client._wire.address.server_key
        result = asyncio.run(collect(client, ([1], SamplingParams(ignore_eos=True))))
        assert len(result[0][0]) == 16
    finally:
        client.close()


def test_sockets_are_private_and_leave_no_file(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = engine_wire.private_folder()
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(engine_process, "private_folder", lambda: folder)
    client = start(model_file)
    try:
        assert not folder.exists()
        assert len(asyncio.run(collect(client, ([1], SamplingParams(ignore_eos=True))))[0][0]) == 16
    finally:
        client.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_engine_ends_with_its_client(model_file: Path) -> None:
    """Also when that is killed, and in the middle of a long answer."""
    code = (
        "import asyncio, os\n"
        "from pyinfer.runtime.engine_process import EngineProcess\n"
        "from pyinfer.runtime.sampling_params import SamplingParams\n"
        "from pyinfer.runtime.tokenizer import load_tokenizer\n"
        "client = EngineProcess()\n"
        f"client.load({str(model_file)!r}, {OPTIONS!r}, lambda: load_tokenizer({str(model_file)!r}))\n"
        "async def main():\n"
        "    async for _ in client.generate([1], SamplingParams(max_tokens=None, ignore_eos=True)):\n"
        "        print(client.pid, flush=True)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        engine = psutil.Process(int(process.stdout.readline()))
        process.kill()
    _, alive = psutil.wait_procs([engine], timeout=10)
    assert not alive
