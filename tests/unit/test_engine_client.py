"""EngineClient: streams across the thread, cancels within a step, drains, fails in the open."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest
from fake_stage import FakeStage, FakeVocabulary

from pyinfer.errors import EngineError, RequestError, UnavailableError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.engine_client import EngineClient
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit

CONFIG = StageConfig(n_pages=48, block_size=16, max_tokens=64, max_sequences=16, n_ctx=256)
LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


class SlowStage(FakeStage):
    """A step takes a millisecond, so that things can happen during a request."""

    def run(self, batch: Batch):  # type: ignore[no-untyped-def]
        time.sleep(0.001)
        return super().run(batch)


def with_client(test: Callable[[EngineClient, Engine], Awaitable[None]], *, slow: bool = False) -> Engine:
    stage = SlowStage(CONFIG) if slow else FakeStage(CONFIG)
    engine = Engine(stage, CONFIG, FakeVocabulary())

    async def main() -> None:
        client = EngineClient.in_process(engine)
        try:
            await asyncio.wait_for(test(client, engine), 30)
        finally:
            client.close()
        assert not client.is_alive

    asyncio.run(main())
    engine.check()
    assert not engine.has_work and engine.stats().pages_used == 0
    return engine


async def collect(client: EngineClient, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(params.n)]
    async for output in client.generate(prompt, params):
        tokens[output.index] += output.new_token_ids
    return tokens


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_concurrent_requests_get_what_they_get_alone() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        jobs = [([1, 2, i], LONG.replace(seed=i, n=1 + i % 3, max_tokens=20)) for i in range(20)]
        together = await asyncio.gather(*(collect(client, prompt, params) for prompt, params in jobs))
        for (prompt, params), tokens in zip(jobs, together, strict=True):
            assert await collect(client, prompt, params) == tokens
            assert [len(each) for each in tokens] == [20] * params.n

    with_client(test)


def test_what_can_never_be_served_is_refused_by_generate_itself() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        with pytest.raises(RequestError, match="context"):
            client.generate([1] * 256, LONG)
        stream = client.generate([1], LONG, request_id="a")
        with pytest.raises(RequestError, match="'a'"):
            client.generate([1], LONG, request_id="a")
        await stream.aclose()

    with_client(test)


def test_abort_ends_a_sample_or_a_request_with_its_reason() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        ends: dict[int, RequestOutput] = {}
        n_chunks = 0
        async for output in client.generate([1], LONG.replace(n=3), request_id="a"):
            n_chunks += 1
            if n_chunks == 10:
                client.abort("a", 1)
            if output.finish_reason is not None:
                ends[output.index] = output
                if output.index == 1:
                    client.abort("a")
        assert {index: output.finish_reason for index, output in ends.items()} == dict.fromkeys(range(3), "abort")
        client.abort("a")
        client.abort("nobody")

    with_client(test, slow=True)


@pytest.mark.parametrize("how", ["aclose", "break", "drop", "unread", "cancel", "async with"])
def test_leaving_a_stream_frees_the_engine(how: str) -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        async def run() -> None:
            stream = client.generate([1, 2], LONG)
            if how == "unread":
                return
            if how == "async with":
                async with stream:
                    await anext(stream)
                return
            async for _ in stream:
                if how == "cancel":
                    continue
                if how == "aclose":
                    await stream.aclose()
                break

        task = asyncio.create_task(run())
        if how == "cancel":
            await until(lambda: engine.stats().generation_tokens > 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task
        del task
        await until(lambda: engine.stats().requests_finished == 1)
        assert engine.stats().generation_tokens < 150

    with_client(test, slow=True)


def test_200_random_disconnects_leak_nothing() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        rng = random.Random(0)

        async def visit(i: int) -> None:
            await asyncio.sleep(rng.random() * 0.3)
            n_wanted = rng.randint(0, 25)
            stream = client.generate([1, 2, i % 7], LONG.replace(n=rng.choice([1, 2]), max_tokens=20))
            async with stream:
                async for _ in stream:
                    n_wanted -= 1
                    if n_wanted < 0:
                        return

        await asyncio.gather(*(visit(i) for i in range(200)))
        await until(lambda: not engine.has_work)
        assert len((await collect(client, [5], LONG))[0]) == 200

    with_client(test)


def test_a_failing_step_reaches_its_callers_and_the_engine_goes_on() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        stage = engine._stage
        assert isinstance(stage, FakeStage)
        stage.fail_at = 5
        results = await asyncio.gather(*(collect(client, [i], LONG) for i in range(3)), return_exceptions=True)
        assert any(isinstance(result, EngineError) for result in results)
        assert all(isinstance(result, EngineError) or len(result[0]) == 200 for result in results)  # type: ignore[index]
        assert len((await collect(client, [1], LONG))[0]) == 200

    with_client(test)


def test_drain_waits_and_refuses_new_requests() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        running = asyncio.create_task(collect(client, [1], LONG.replace(max_tokens=50)))
        await until(lambda: engine.stats().running == 1)
        draining = asyncio.create_task(client.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            client.generate([1], LONG)
        assert await draining is True
        assert len((await running)[0]) == 50

    with_client(test, slow=True)


def test_drain_aborts_what_takes_too_long() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        stream = client.generate([1], LONG)
        assert await client.drain(0.03) is False
        assert [output.finish_reason async for output in stream][-1] == "abort"

    with_client(test, slow=True)


def test_close_ends_open_streams_with_an_error() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        stream = client.generate([1], LONG)
        await anext(stream)
        client.close()
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass
        with pytest.raises(UnavailableError):
            client.generate([1], LONG)

    with_client(test, slow=True)


def test_a_fault_in_the_engine_itself_is_not_a_hang() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        def broken() -> list[RequestOutput]:
            raise AssertionError("the books do not balance")

        engine.step = broken  # type: ignore[method-assign]
        with pytest.raises(UnavailableError):
            await collect(client, [1], LONG)
        await until(lambda: not client.is_alive)

    with_client(test)


def test_idle_engine_waits() -> None:
    async def test(client: EngineClient, engine: Engine) -> None:
        await collect(client, [1], LONG)
        calls = 0
        step = engine.step

        def counted() -> list[RequestOutput]:
            nonlocal calls
            calls += 1
            return step()

        engine.step = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.1)
        assert calls == 0
        await collect(client, [1], LONG)
        assert calls == 200

    with_client(test)
