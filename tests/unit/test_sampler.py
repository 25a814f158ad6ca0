"""Sampling against plain definitions in float64 over the whole, fully sorted vocabulary."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.runtime.logprobs import token_logprobs
from pyinfer.runtime.sample_filters import head
from pyinfer.runtime.sample_random import uniform
from pyinfer.runtime.sampler import NOT_FINITE, SequenceSampler, sample
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.unit
Row = npt.NDArray[np.float32]


def make_row(n: int, seed: int, spread: float = 3.0) -> Row:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


def sampler_of(params: SamplingParams, **kwargs: object) -> SequenceSampler:
    return SequenceSampler(params, **{"seed": 1, "index": 0, "n_prompt": 0, **kwargs})  # type: ignore[arg-type]


def plain_distribution(row: Row, params: SamplingParams) -> npt.NDArray[np.float64]:
    """Temperature, min_p, top_k, typical_p, top_p as their papers define them, each over what the one before left."""
    logits = row.astype(np.float64) / params.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    order = sorted(range(len(p)), key=lambda i: (-row[i], i))
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.typical_p < 1:
        alive = [i for i in order if p[i] > 0]
        entropy = -sum(p[i] * math.log(p[i]) for i in alive)
        p = first_share(p, sorted(alive, key=lambda i: abs(-math.log(p[i]) - entropy)), params.typical_p)
    if params.top_p < 1:
        p = first_share(p, order, params.top_p)
    return p / p.sum()


def first_share(p: npt.NDArray[np.float64], order: list[int], share: float) -> npt.NDArray[np.float64]:
    kept, held = np.zeros_like(p), 0.0
    for i in order:
        if held >= share:
            break
        kept[i] = p[i]
        held += p[i]
    return kept / kept.sum()


def drawn_distribution(row: Row, params: SamplingParams, n: int = 4000) -> npt.NDArray[np.float64]:
    counts = np.zeros(row.size)
    sampler = sampler_of(params)
    for position in range(n):
        counts[sampler.next(row, [0] * position)] += 1
    return counts / n


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0, top_k=5),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.3, temperature=1.5),
    SamplingParams(min_p=0.2),
    SamplingParams(typical_p=0.5),
    SamplingParams(top_k=12, typical_p=0.7, top_p=0.9),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    SamplingParams(top_k=1000, min_p=0.01, top_p=0.99),
]


@pytest.mark.parametrize("params", FILTERS, ids=repr)
@pytest.mark.parametrize("n_vocab", [37, 700])
def test_draws_follow_the_defined_distribution(params: SamplingParams, n_vocab: int) -> None:
    row = make_row(n_vocab, seed=n_vocab)
    expected = plain_distribution(row, params)
    drawn = drawn_distribution(row, params)
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected)), "a token that was filtered out came up"
    big = expected > 0.02
    error = 5 * np.sqrt(expected[big] * (1 - expected[big]) / 4000)
    assert (np.abs(drawn - expected)[big] < error + 1e-9).all()
    assert abs(drawn[~big].sum() - expected[~big].sum()) < 0.05


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.integers(2, 5000),
    st.floats(0.05, 3.0),
    st.sampled_from([0, 1, 3, 40]),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.02, 0.5]),
    st.sampled_from([1.0, 0.6]),
)
def test_every_draw_is_in_the_support(
    seed: int, n_vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    row = make_row(n_vocab, seed, spread=4)
    expected = plain_distribution(row, params)
    sampler = sampler_of(params, seed=seed)
    near = expected.max() * 1e-6  # float32 may put a token at the very edge on the other side
    alive = expected[expected > 0].min()
    for position in range(8):
        token = sampler.next(row, [0] * position)
        p = math.exp((float(row[token]) - float(row.max())) / temperature)
        assert expected[token] > 0 or p >= alive * 0.99 - near


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 20_000), st.integers(1, 300), st.booleans())
def test_head_is_the_start_of_a_stable_full_sort(seed: int, n: int, k: int, many_ties: bool) -> None:
    row = make_row(n, seed)
    if many_ties:
        row = np.round(row)
    expected = np.argsort(-row, kind="stable")[:k]
    assert (head(row, k) == expected).all()


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    row = np.zeros(100, np.float32)
    row[[70, 30]] = 5
    assert sampler_of(SamplingParams(temperature=0)).next(row, []) == 30
    assert sample(row[None], [0], [sampler_of(SamplingParams(temperature=0))], [[]]) == [30]


def test_one_candidate_is_greedy() -> None:
    row = make_row(500, 3)
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(min_p=1.0)):
        assert sampler_of(params).next(row, []) == int(row.argmax())


def test_randomness_is_keyed_by_seed_index_and_position_alone() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    others = [uniform(2, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4), uniform(-1, 2, 3), uniform(2**63 + 1, 2, 3)]
    assert len({uniform(1, 2, 3), *others}) == 6
    assert uniform(2**64 - 1, 0, 0) == uniform(-1, 0, 0)
    values = np.array([uniform(seed, 0, position) for seed in range(50) for position in range(400)])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, 100, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 149  # chi square, 99 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_a_draw_depends_on_the_absolute_position_not_on_where_the_prompt_ends() -> None:
    row = make_row(5000, 1, spread=1)
    params = SamplingParams(seed=1)
    tokens = list(range(30))
    assert sampler_of(params, n_prompt=10).next(row, tokens) == sampler_of(params, n_prompt=30).next(row, tokens)
    assert sampler_of(params).next(row, tokens) != sampler_of(params).next(row, tokens[:-1])


def test_row_is_left_as_it_is_and_batch_does_not_matter() -> None:
    rows = np.stack([make_row(300, seed) for seed in range(6)])
    before = rows.copy()
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=7),
        SamplingParams(repetition_penalty=1.3, logit_bias={4: 2.0}),
        SamplingParams(temperature=0, ignore_eos=True),
        SamplingParams(top_p=0.5),
        SamplingParams(temperature=0, frequency_penalty=1.0),
    ]
    histories = [[1, 2, 3 + i] for i in range(6)]

    def samplers() -> list[SequenceSampler]:
        return [sampler_of(p, index=i, eog_ids=[int(rows[i].argmax())]) for i, p in enumerate(kinds)]

    together = sample(rows, range(6), samplers(), histories)
    alone = [sample(rows[i][None], [0], [samplers()[i]], [histories[i]])[0] for i in range(6)]
    backwards = sample(rows, range(5, -1, -1), samplers()[::-1], histories[::-1])[::-1]
    assert together == alone == backwards
    assert (rows == before).all()


def test_repetition_penalty_counts_prompt_and_output_presence_and_frequency_only_output() -> None:
    row = np.array([2.0, -1.0, 1.0, 0.5], np.float32)
    tokens = [0, 1, 2, 2]  # prompt 0, 1; output 2, 2

    def changed(**kwargs: float) -> list[float]:
        sampler = sampler_of(SamplingParams(temperature=0, **kwargs), n_prompt=2)  # type: ignore[arg-type]
        return [round(float(x), 6) for x in sampler._changed(row, tokens)]

    assert changed(repetition_penalty=2.0) == [1.0, -2.0, 0.5, 0.5]
    assert changed(presence_penalty=0.25) == [2.0, -1.0, 0.75, 0.5]
    assert changed(frequency_penalty=0.25) == [2.0, -1.0, 0.5, 0.5]
    assert changed(repetition_penalty=2.0, repeat_last_n=3) == [2.0, -2.0, 0.5, 0.5]
    assert changed(frequency_penalty=0.25, repeat_last_n=1) == [2.0, -1.0, 0.75, 0.5]
    assert changed(repetition_penalty=2.0, repeat_last_n=0) == row.tolist()


def test_penalties_kept_over_steps_equal_those_computed_anew() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2)
    rng = np.random.default_rng(0)
    kept = sampler_of(params, n_prompt=5)
    tokens = rng.integers(0, 50, 5).tolist()
    for step in range(40):
        row = make_row(50, step)
        anew = sampler_of(params, n_prompt=5)._changed(row, tokens)
        assert (kept._changed(row, tokens) == anew).all()
        tokens.append(int(rng.integers(0, 50)))


def test_logit_bias_forbids_and_forces() -> None:
    row = make_row(60, 0)
    best = int(row.argmax())
    assert sampler_of(SamplingParams(temperature=0, logit_bias={best: -100})).next(row, []) != best
    assert sampler_of(SamplingParams(logit_bias={17: 100})).next(row, []) == 17


def test_end_tokens_are_masked_early_or_always() -> None:
    row = np.zeros(10, np.float32)
    row[[3, 4, 5]] = [9, 8, 7]
    early = sampler_of(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[4]), n_prompt=1, eog_ids=[3])
    assert [early.next(row, [0] * n) for n in (1, 2, 3)] == [5, 5, 3]
    always = sampler_of(SamplingParams(temperature=0, ignore_eos=True), eog_ids=[3])
    assert always.next(row, [0] * 50) == 4
    both = sampler_of(SamplingParams(ignore_eos=True, min_tokens=1, stop_token_ids=[4], top_k=1), eog_ids=[3])
    assert [both.next(row, [0] * n) for n in (0, 1)] == [5, 4]


def test_bad_words_forbid_the_token_that_completes_them_in_the_output() -> None:
    row = np.zeros(10, np.float32)
    row[[3, 4]] = [9, 8]
    sampler = sampler_of(SamplingParams(temperature=0), n_prompt=2, bad_words=[[1, 2, 3]])
    assert sampler.next(row, [1, 2]) == 3, "the prompt does not count"
    assert sampler.next(row, [0, 0, 1, 2]) == 4
    assert sampler.next(row, [0, 0, 2, 2]) == 3
    assert sampler_of(SamplingParams(temperature=0), bad_words=[[3]]).next(row, []) == 4


def test_logits_that_are_not_finite_are_noticed() -> None:
    for value in (np.nan, np.inf):
        rows = np.stack([make_row(50, 0), make_row(50, 1)])
        rows[1, 7] = value
        for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=3, min_p=0.1)):
            samplers = [sampler_of(params), sampler_of(params)]
            first, second = sample(rows, [0, 1], samplers, [[], []])
            assert first != NOT_FINITE and second == NOT_FINITE


def test_logprobs_are_the_log_softmax_with_ranks() -> None:
    row = make_row(3000, 5)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    order = np.argsort(-row, kind="stable").tolist()
    token = order[10]
    entries = token_logprobs(row, token, 3)
    assert list(entries) == [token, *order[:3]]
    assert [entry.rank for entry in entries.values()] == [11, 1, 2, 3]
    assert all(abs(entry.logprob - exact[i]) < 1e-5 for i, entry in entries.items())
    assert list(token_logprobs(row, order[1], 3)) == [order[1], order[0], order[2]]
    assert list(token_logprobs(row, token, 0)) == [token]
    everyone = token_logprobs(row, token, -1)
    assert len(everyone) == 3000 and abs(sum(math.exp(e.logprob) for e in everyone.values()) - 1) < 1e-4


def test_seeded_samples_of_one_request_differ() -> None:
    row = make_row(200, 1, spread=1)
    drawn = Counter(sampler_of(SamplingParams(), index=index).next(row, []) for index in range(200))
    assert len(drawn) > 60
