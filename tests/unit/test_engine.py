"""Engine: every request gets the tokens it would get alone, whatever runs beside it; nothing leaks, nobody starves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_stage import END, N_VOCAB, FakeStage, FakeVocabulary
from plain_engine import alone, prompt_of

from pyinfer.errors import DeviceLostError, RequestError
from pyinfer.graph.backend import StageConfig
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.logprobs import token_logprobs
from pyinfer.runtime.outputs import RequestOutput, TokenLogprobs
from pyinfer.runtime.plan import Plan
from pyinfer.runtime.preemption_cost import PreemptionCost
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit

CONFIG = StageConfig(n_pages=64, block_size=16, max_tokens=64, max_sequences=16, n_ctx=256)
TIGHT = StageConfig(n_pages=14, block_size=16, max_tokens=24, max_sequences=6, n_ctx=200)
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def new_engine(config: StageConfig = CONFIG, **kwargs: object) -> Engine:
    return Engine(FakeStage(config), config, FakeVocabulary(), **kwargs)  # type: ignore[arg-type]


def stage_of(engine: Engine) -> FakeStage:
    stage = engine._stage
    assert isinstance(stage, FakeStage)
    return stage


def drive(engine: Engine) -> dict[tuple[str, int], list[RequestOutput]]:
    chunks: dict[tuple[str, int], list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.failure is None, output
            chunks.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    return chunks


def tokens_of(chunks: list[RequestOutput]) -> list[int]:
    return [token for chunk in chunks for token in chunk.new_token_ids]


# ---- results


@pytest.mark.parametrize("config", [CONFIG, TIGHT, replace(CONFIG, max_tokens=1), replace(CONFIG, block_size=32)])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_tokens_are_those_of_the_request_alone(config: StageConfig, prefix_caching: bool) -> None:
    engine = new_engine(config, prefix_caching=prefix_caching)
    requests = {}
    for i in range(12):
        params = SamplingParams(
            max_tokens=5 + 9 * (i % 4), seed=i, temperature=[0, 1, 0.7][i % 3], n=1 + i % 2, top_k=9
        )
        requests[str(i)] = (prompt_of(1 + 11 * i, seed=i % 5), params)
        engine.add_request(str(i), *requests[str(i)])
    chunks = drive(engine)
    for (name, index), got in chunks.items():
        prompt, params = requests[name]
        assert tokens_of(got) == alone(prompt, params, index, config.n_ctx), name
        assert got[-1].finish_reason == ("stop" if tokens_of(got)[-1] == END else "length")
        assert all(chunk.finish_reason is None for chunk in got[:-1])
    assert len(chunks) == 18
    assert engine.scheduler.pool.n_held == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("mode", "n_swap_pages"), [("recompute", 0), ("swap", 4), ("swap", 100), ("auto", 100)])
def test_preemption_changes_nothing(mode: str, n_swap_pages: int, prefix_caching: bool) -> None:
    config = replace(TIGHT, n_pages=8)
    options = {"preemption_mode": mode, "n_swap_pages": n_swap_pages, "prefix_caching": prefix_caching}
    engine = new_engine(config, **options)
    params = SamplingParams(max_tokens=70, ignore_eos=True, seed=3, logprobs=2)
    for i in range(3):
        engine.add_request(str(i), prompt_of(20, i), params)
    together = drive(engine)
    stats = engine.stats()
    assert stats.preemptions > 0 and (mode == "auto" or (stats.swaps > 0) == (mode == "swap"))
    if n_swap_pages == 100 and mode == "swap":
        assert stats.swaps == stats.preemptions
        assert stage_of(engine).n_tokens == 3 * (20 + 69), "nothing is computed again"
    for i in range(3):
        single = new_engine(config)
        single.add_request(str(i), prompt_of(20, i), params)
        expected = drive(single)[str(i), 0]
        assert tokens_of(together[str(i), 0]) == tokens_of(expected)
        assert [c.new_logprobs for c in together[str(i), 0]] == [c.new_logprobs for c in expected]
    assert sum(c.metrics.preemptions for chunks in together.values() for c in chunks if c.metrics) > 0


def test_the_cheaper_way_to_give_way_is_taken() -> None:
    cost = PreemptionCost()
    assert cost.prefers_swap(100, 7), "to be measured"
    for _ in range(50):
        cost.note_computed(64, 0.064)
        cost.note_computed(1, 10.0)
        cost.note_copied(2, 0.014)
    assert cost.prefers_swap(113, 8) and not cost.prefers_swap(111, 8), "1 ms a token, 7 ms a page and way"
    for _ in range(50):
        cost.note_copied(2, 0.001)
    assert cost.prefers_swap(10, 8)
    assert not PreemptionCost("recompute").prefers_swap(1000, 1)


def test_an_error_while_pages_are_moved_ends_those_that_it_may_have_hurt() -> None:
    engine = new_engine(replace(TIGHT, n_pages=8), preemption_mode="swap", n_swap_pages=100)
    for i in range(4):
        engine.add_request(str(i), prompt_of(20, i), replace_params(max_tokens=70, seed=3))
    stage = stage_of(engine)

    def broken(pages: object) -> None:
        raise RuntimeError("no more host memory")

    read, stage.read_pages = stage.read_pages, broken  # type: ignore[method-assign,assignment]
    failed: list[str] = []
    while not failed:
        failed = [output.request_id for output in engine.step() if output.failure is not None]
        engine.check()
    assert len(failed) >= 2, "one that ran and one that gave way"
    stage.read_pages = read  # type: ignore[method-assign]
    for (name, _), chunks in drive(engine).items():
        assert name not in failed and chunks[-1].finish_reason == "length"
    assert engine.stats().pages_used == 0


def test_prefix_reuse_is_reported_and_changes_nothing() -> None:
    engine = new_engine()
    prompt = prompt_of(50)
    results = []
    for name in ("cold", "warm"):
        engine.add_request(name, prompt, GREEDY)
        results.append(drive(engine)[name, 0])
    assert tokens_of(results[0]) == tokens_of(results[1])
    assert [chunks[0].cached_tokens for chunks in results] == [0, 48]
    engine.add_request("salted", prompt, GREEDY, salt="other")
    assert drive(engine)["salted", 0][0].cached_tokens == 0


def test_samples_compute_the_prompt_once_and_differ() -> None:
    engine = new_engine()
    engine.add_request("a", prompt_of(160), SamplingParams(n=4, max_tokens=8, seed=5, ignore_eos=True))
    chunks = drive(engine)
    assert len({tuple(tokens_of(chunks["a", i])) for i in range(4)}) == 4
    assert stage_of(engine).n_tokens == 160 + 4 * 7


def test_seedless_requests_differ_but_follow_the_engines_seed() -> None:
    def run(seed: int) -> list[list[int]]:
        engine = new_engine(seed=seed)
        for i in range(3):
            engine.add_request(str(i), [1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
        return [tokens_of(chunks) for _, chunks in sorted(drive(engine).items())]

    assert run(0) == run(0) != run(1)
    assert len({tuple(tokens) for tokens in run(0)}) == 3


# ---- ends


def test_stop_token_is_kept_and_named() -> None:
    engine = new_engine()
    whole = alone([5], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    stop = whole[9]
    first = whole.index(stop)
    engine.add_request("a", [5], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[stop]))
    chunks = drive(engine)["a", 0]
    assert tokens_of(chunks) == whole[: first + 1]
    assert (chunks[-1].finish_reason, chunks[-1].stop_token) == ("stop", stop)
    engine.add_request(
        "b",
        [5],
        SamplingParams(temperature=0, max_tokens=30, min_tokens=first + 2, ignore_eos=True, stop_token_ids=[stop]),
    )
    assert len(tokens_of(drive(engine)["b", 0])) > first + 1


def test_max_tokens_none_and_too_many_end_at_the_context() -> None:
    engine = new_engine()
    for name, max_tokens in (("a", None), ("b", 10_000)):
        engine.add_request(name, prompt_of(200), SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))
        chunks = drive(engine)[name, 0]
        assert len(tokens_of(chunks)) == 56 and chunks[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], GREEDY, "empty"),
        ([N_VOCAB], GREEDY, f"id {N_VOCAB}.*{N_VOCAB - 1}"),
        ([-1], GREEDY, "-1"),
        ([1] * 256, GREEDY, "256 tokens.* 256 .*255"),
        ([1], SamplingParams(stop_token_ids=[N_VOCAB]), "stop_token_ids"),
        ([1], SamplingParams(logit_bias={N_VOCAB: 1}), "logit_bias"),
        ([1], SamplingParams(logprobs=N_VOCAB + 1), "logprobs"),
        ([1], SamplingParams(prompt_logprobs=99), "prompt_logprobs"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(prompt: list[int], params: SamplingParams, match: str) -> None:
    engine = new_engine()
    with pytest.raises(RequestError, match=match):
        engine.add_request("a", prompt, params)
    engine.check()
    assert not engine.has_work


def test_a_pool_smaller_than_the_context_bounds_requests() -> None:
    engine = new_engine(replace(CONFIG, n_pages=2))
    with pytest.raises(RequestError, match="context of 32"):
        engine.add_request("a", [1] * 32, GREEDY)
    engine.add_request("b", [1] * 31, SamplingParams(ignore_eos=True))
    assert len(tokens_of(drive(engine)["b", 0])) == 1


def test_an_id_in_use_is_refused_and_free_again_later() -> None:
    engine = new_engine()
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(RequestError, match="'a'"):
        engine.add_request("a", [1], GREEDY)
    drive(engine)
    engine.add_request("a", [1], GREEDY)


def test_abort_of_a_request_and_of_one_sample() -> None:
    engine = new_engine()
    params = SamplingParams(n=3, max_tokens=50, ignore_eos=True, seed=0)
    engine.add_request("a", [1, 2], params)
    engine.add_request("b", [1, 2], params)
    for _ in range(5):
        engine.step()
    [output] = engine.abort("a", 1)
    assert (output.index, output.finish_reason) == (1, "abort") and output.metrics is not None
    assert len(engine.abort("b")) == 3
    assert engine.abort("b") == engine.abort("nobody") == engine.abort("a", 1) == []
    engine.check()
    rest = drive(engine)
    assert set(rest) == {("a", 0), ("a", 2)}
    assert engine.scheduler.pool.n_held == 0 and engine.stats().requests_finished == 2


# ---- failures


def test_an_error_in_a_step_ends_its_requests_and_no_others() -> None:
    engine = new_engine(replace(CONFIG, max_sequences=2))
    for name in "abc":
        engine.add_request(name, prompt_of(40, ord(name)), replace_params(seed=1, n=2 if name == "b" else 1))
    stage_of(engine).fail_at = 3
    engine.step()
    engine.step()
    outputs = engine.step()
    engine.check()
    assert [output.request_id for output in outputs] == ["a", "b"], "one chunk each, the waiting sample included"
    assert all(output.failure is not None and "fell over" in output.failure.message for output in outputs)
    chunks = drive(engine)
    assert tokens_of(chunks["c", 0]) == alone(prompt_of(40, ord("c")), replace_params(seed=1))
    assert engine.scheduler.pool.n_held == 0


def test_a_lost_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step would succeed on it: the process that takes over has the requests still to do."""
    engine = new_engine()
    engine.add_request("a", [1, 2, 3], replace_params(seed=1))

    def lost(batch: object) -> object:
        raise DeviceLostError("GPU 0 (Fake GPU) failed: an illegal memory access was encountered")

    monkeypatch.setattr(stage_of(engine), "run", lost)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        drive(engine)


def replace_params(**changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=12, ignore_eos=True).replace(**changes)


def test_logits_that_are_not_finite_fail_only_their_request() -> None:
    engine = new_engine()
    stage = stage_of(engine)
    engine.add_request("bad", [1, 2, 3], replace_params(seed=1))
    engine.add_request("good", [4, 5, 6], replace_params(seed=1))
    run = stage.run

    def broken(batch):  # type: ignore[no-untyped-def]
        logits = run(batch)
        logits[0, 5] = np.nan
        return logits

    stage.run = broken  # type: ignore[method-assign]
    [failed, fine] = engine.step()
    stage.run = run  # type: ignore[method-assign]
    assert failed.request_id == "bad" and failed.failure is not None and "finite" in failed.failure.message
    assert fine.new_token_ids + tokens_of(drive(engine)["good", 0]) == alone([4, 5, 6], replace_params(seed=1))


# ---- logprobs and logits


def expected_prompt_logprobs(prompt: list[int], n: int) -> list[TokenLogprobs | None]:
    stage = FakeStage(CONFIG)
    rows = [stage.logits_after(np.array(prompt[: i + 1])) for i in range(len(prompt) - 1)]
    return [None, *(token_logprobs(row, token, n) for row, token in zip(rows, prompt[1:], strict=True))]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, max_tokens=7), replace(TIGHT, n_pages=9)])
def test_prompt_logprobs_and_logprobs(config: StageConfig) -> None:
    engine = new_engine(config)
    prompt = prompt_of(60)
    engine.add_request("first", prompt, GREEDY)  # fills the prefix cache, which prompt_logprobs must not read
    drive(engine)
    for i in range(3):
        params = SamplingParams(max_tokens=30, ignore_eos=True, prompt_logprobs=2, logprobs=3, seed=i, n=1 + i % 2)
        engine.add_request(str(i), prompt, params)
    chunks = drive(engine)
    for i in range(3):
        assert chunks[str(i), 0][0].prompt_logprobs == expected_prompt_logprobs(prompt, 2)
        assert chunks[str(i), 0][0].cached_tokens == 0
        assert all(chunk.prompt_logprobs is None for chunk in chunks[str(i), 0][1:])
        tokens = list(prompt)
        for chunk in chunks[str(i), 0]:
            row = stage_of(engine).logits_after(np.array(tokens))
            assert chunk.new_logprobs == [token_logprobs(row, chunk.new_token_ids[0], 3)]
            tokens += chunk.new_token_ids


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, max_tokens=5), replace(TIGHT, n_pages=9)])
def test_logits_of_every_row(config: StageConfig) -> None:
    engine = new_engine(config)
    prompts = [prompt_of(length, length) for length in (1, 60, 100, 60)]
    engine.add_request("warm", prompts[1], SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(20):
        engine.step()
    for i, prompt in enumerate(prompts):
        engine.add_scoring(str(i), prompt)
    drive(engine)
    stage = FakeStage(config)
    for i, prompt in enumerate(prompts):
        expected = np.stack([stage.logits_after(np.array(prompt[: j + 1])) for j in range(len(prompt))])
        assert (engine.take_logits(str(i)) == expected).all()
    engine.check()
    with pytest.raises(RequestError, match=r"tokens are over the context"):
        engine.add_scoring("long", [1] * (engine.n_ctx + 1))
    engine.add_scoring("full", [1] * engine.n_ctx)
    drive(engine)
    assert engine.take_logits("full").shape == (engine.n_ctx, N_VOCAB)


def test_scoring_can_be_aborted() -> None:
    engine = new_engine()
    engine.add_scoring("a", prompt_of(200))
    engine.step()
    engine.abort("a")
    engine.add_scoring("b", [1, 2])
    drive(engine)
    engine.abort("b")
    assert not engine._requests


@pytest.mark.parametrize("block_size", [16, 32])
def test_steps_that_are_decided_ahead_change_nothing(block_size: int) -> None:
    config = replace(CONFIG, block_size=block_size)
    results = []
    for multi_step in (1, 8):
        engine = new_engine(config, multi_step=multi_step)
        decide, n_decided = engine.scheduler._plan_decodes, 0

        def counted(plan: Plan, decide: Any = decide) -> Any:
            nonlocal n_decided
            n_decided += 1
            return decide(plan)

        engine.scheduler._plan_decodes = counted  # type: ignore[method-assign]
        for i in range(3):
            params = SamplingParams(n=1 + i, max_tokens=60 + i, seed=i, ignore_eos=i > 0)
            engine.add_request(str(i), prompt_of(20 * i + 7, i), params)
        chunks = drive(engine)
        results.append({key: tokens_of(each) for key, each in chunks.items()})
        n_steps = stage_of(engine).n_steps
        assert n_decided == n_steps if multi_step == 1 else n_decided < n_steps / 2
    assert results[0] == results[1]


def test_who_comes_between_steps_that_are_decided_ahead_is_served_in_the_next() -> None:
    engine = new_engine(multi_step=100)
    engine.add_request("a", prompt_of(3), replace_params(max_tokens=100))
    for _ in range(5):
        engine.step()
    engine.add_request("b", prompt_of(9), replace_params(max_tokens=3))
    assert [output.request_id for output in engine.step()] == ["a", "b"]
    engine.abort("a")
    assert [output.request_id for output in engine.step()] == ["b"]
