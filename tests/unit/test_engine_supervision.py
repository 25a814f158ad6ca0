"""What a client keeps to bring a dead engine back: the ledger of requests, the totals, the patience with a step."""

from __future__ import annotations

import pytest

from pyinfer.errors import ConfigError, EngineError, GGUFError
from pyinfer.runtime.engine_messages import AbortRequest, AddRequest, LoadFailed
from pyinfer.runtime.engine_totals import EngineTotals
from pyinfer.runtime.outputs import EngineStats, RequestFailure, RequestOutput
from pyinfer.runtime.request_ledger import MAX_DEATHS, RequestLedger
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.step_watch import StepWatch

pytestmark = pytest.mark.unit


def add(request_id: str, n: int = 1) -> AddRequest:
    return AddRequest(request_id, [1, 2], SamplingParams(n=n, seed=1))


def test_ledger_knows_what_each_sample_has() -> None:
    ledger = RequestLedger()
    for request in (add("a", 3), add("b"), add("c"), add("d")):
        ledger.add(request)
    for output in (
        RequestOutput("a", 0, [5]),
        RequestOutput("a", 1, [6]),
        RequestOutput("a", 0, [7]),
        RequestOutput("a", 1, [8], finish_reason="stop"),
        RequestOutput("b", 0, [9], finish_reason="length"),
        RequestOutput("c", failure=RequestFailure("x", "server_error", 500)),
        RequestOutput("nobody", 0, [1]),
    ):
        ledger.note(output)
    ledger.abort(AbortRequest("a", 2))
    ledger.abort(AbortRequest("nobody"))
    assert ledger.request_ids == ["a", "d"] and len(ledger) == 2
    first, abort, second = ledger.messages()
    assert isinstance(first, AddRequest) and first.resume == [[5, 7], None, []]
    assert abort == AbortRequest("a", 2)
    assert isinstance(second, AddRequest) and (second.request_id, second.resume) == ("d", [[]])
    ledger.forget("d")
    assert ledger.request_ids == ["a"]


def test_ledger_suspects_who_gets_nowhere() -> None:
    ledger = RequestLedger()
    ledger.add(add("moves"))
    ledger.add(add("stands"))
    for _ in range(MAX_DEATHS - 1):
        assert ledger.count_death() == []
        ledger.note(RequestOutput("moves", 0, [1]))
    assert ledger.count_death() == ["stands"]
    assert ledger.request_ids == ["moves"]


def stats(**fields: int) -> EngineStats:
    return EngineStats(**{**dict.fromkeys(EngineStats.__struct_fields__, 0), **fields})


def test_totals_go_on_growing() -> None:
    totals = EngineTotals()
    assert totals.take(stats(prompt_tokens=10, generation_tokens=1, pages_total=8, running=2, steps=1)) == 11
    assert totals.take(stats(prompt_tokens=10, generation_tokens=4, pages_total=8, running=2, steps=2)) == 3
    totals.restart()
    dead = totals.stats(5)
    assert (dead.running, dead.waiting, dead.pages_total, dead.generation_tokens) == (0, 5, 8, 4)
    assert totals.take(stats(prompt_tokens=12, generation_tokens=2, pages_total=8, waiting=1, steps=1)) == 14
    alive = totals.stats(5)
    assert (alive.prompt_tokens, alive.generation_tokens, alive.steps, alive.waiting) == (22, 6, 3, 1)


def test_patience_grows_with_what_a_full_step_takes() -> None:
    watch = StepWatch(512, floor=30.0, first=600.0)
    assert watch.limit == 600.0
    watch.note(0.1, 100)
    assert watch.limit == 30.0
    watch.note(4.0, 512)  # 20 times as long
    assert watch.limit == 80.0
    watch.note(0.05, 1)
    watch.note(0.0, 0)
    assert watch.limit == 80.0
    slow = StepWatch(512, floor=30.0)
    slow.note(0.5, 4)  # a short prompt on a slow machine: a full one may take 64 s
    assert slow.limit == pytest.approx(1280.0)


@pytest.mark.parametrize("error", [GGUFError("a broken file"), ConfigError("n_ctx is 0", param="n_ctx")])
def test_errors_keep_their_kind(error: GGUFError | ConfigError) -> None:
    copy = LoadFailed.of(error).error()
    assert type(copy) is type(error) and (str(copy), copy.param) == (str(error), error.param)
    assert isinstance(LoadFailed.of(ValueError("x")).error(), EngineError)
    assert "--kv-cache-memory" in str(LoadFailed.of(MemoryError()).error())
