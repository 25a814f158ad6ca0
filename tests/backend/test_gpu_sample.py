"""`sample.cu` on the emulator: from the same logits the same tokens as the host's sampler draws, and the same logprobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice

from pyinfer.graph.sampling import NOT_FINITE, RowSampling, Sampled
from pyinfer.kernels_gpu.sample import DeviceSampler
from pyinfer.runtime.logprobs import token_logprobs
from pyinfer.runtime.sample_random import uniform
from pyinfer.runtime.sampler import SequenceSampler
from pyinfer.runtime.sampling_params import SamplingParams

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
F32 = npt.NDArray[np.float32]
N_VOCAB = 5003  # more than two chunks of ids, not a multiple of anything
PROMPT = [5, 6, 7, 8, 9, 5, 5]


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


def drawn(sampler: DeviceSampler, *args: Any) -> Sampled:
    return sampler.fetch(sampler.start(*args))


def host_and_device(
    device: EmulatedDevice, logits: F32, samplers: list[SequenceSampler], histories: list[list[int]]
) -> tuple[list[int], list[int]]:
    n, n_vocab = logits.shape
    rows = []
    for i, (sampler, history) in enumerate(zip(samplers, histories, strict=True)):
        row = sampler.on_device(i, history)
        assert row is not None
        rows.append(row)
    buffer = device.array(logits)
    made = DeviceSampler(device, n_vocab, n)
    tokens = drawn(made, buffer, n_vocab, rows).tokens
    np.testing.assert_array_equal(device.values(buffer, np.float32, n, n_vocab), logits)  # edits are taken back
    expected = [
        sampler.next(logits[i], history) for i, (sampler, history) in enumerate(zip(samplers, histories, strict=True))
    ]
    return expected, tokens


def check(device: EmulatedDevice, logits: F32, **params: Any) -> list[int]:
    """Every row is a sequence of its own with this sampling; returns the tokens."""
    histories = [[*PROMPT, *range(10, 10 + i % 7), 11, 11] for i in range(len(logits))]
    samplers = [
        SequenceSampler(SamplingParams(**params), seed=3, index=i, n_prompt=len(PROMPT), eog_ids=[1, 2])
        for i in range(len(logits))
    ]
    expected, tokens = host_and_device(device, logits, samplers, histories)
    assert tokens == expected
    return tokens


def normal(n: int, scale: float = 3.0, n_vocab: int = N_VOCAB, seed: int = 0) -> F32:
    return (np.random.RandomState(seed).standard_normal((n, n_vocab)) * scale).astype(np.float32)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 40, "temperature": 0.8},
        {"top_k": 2000},
        {"top_k": N_VOCAB},
        {"top_p": 0.9},
        {"top_p": 0.05, "temperature": 1.3},
        {"top_p": 1e-9},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"min_p": 0.3, "top_p": 0.6, "temperature": 2.0},
        {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
        {"top_k": 1500, "top_p": 0.5, "temperature": 1.5},
    ],
)
def test_the_same_tokens_as_the_host(params: dict[str, Any], device: EmulatedDevice) -> None:
    tokens = check(device, normal(24), **params)
    assert len(set(tokens)) > 12


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3, "temperature": 0.0},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_k": 40},
        {"logit_bias": {11: 100.0, 12: -100.0, 400: 3.5}, "temperature": 1.0},
        {"ignore_eos": True, "top_p": 0.9},
        {"min_tokens": 5, "stop_token_ids": [7], "temperature": 0.0, "max_tokens": 9},
        {
            "repetition_penalty": 0.7,
            "frequency_penalty": -1.0,
            "logit_bias": {5: -2.0},
            "ignore_eos": True,
            "min_p": 0.02,
        },
        {"repetition_penalty": 1.5, "repeat_last_n": 3, "top_k": 5},
    ],
)
def test_edits_of_single_logits(params: dict[str, Any], device: EmulatedDevice) -> None:
    logits = normal(12)
    logits[:, [1, 2, 5, 7, 9, 11, 12]] = logits.max() + np.arange(7, dtype=np.float32) / 4  # so that each edit tells
    check(device, logits, **params)


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 7}, {"top_p": 0.4}, {"min_p": 0.5}, {"temperature": 0.0}, {"top_k": 1200}]
)
def test_ties_go_to_the_lower_id(params: dict[str, Any], device: EmulatedDevice) -> None:
    """Logits of a few values only, zeros of both signs among them."""
    values = np.array([-4, -0.0, 0.0, 1, 1.5], np.float32)
    logits = values[np.random.RandomState(1).randint(0, 5, (16, N_VOCAB))]
    check(device, logits, **params)


@pytest.mark.parametrize("n_vocab", [1, 31, 2048, 2049])
def test_other_vocabularies(n_vocab: int, device: EmulatedDevice) -> None:
    logits = normal(6, n_vocab=n_vocab)
    for params in ({}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0.0}):
        samplers = [SequenceSampler(SamplingParams(**params), seed=1, index=i, n_prompt=1) for i in range(6)]  # type: ignore[arg-type]
        expected, tokens = host_and_device(device, logits, samplers, [[0]] * 6)
        assert tokens == expected


def test_a_sharp_row_and_a_row_with_infinities(device: EmulatedDevice) -> None:
    logits = normal(4, scale=40.0)
    logits[1, 17] = 500.0
    logits[2, ::2] = -np.inf
    for params in ({}, {"top_p": 0.9}, {"top_k": 30, "temperature": 0.5}, {"min_p": 0.1}):
        check(device, logits, **params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad: float, device: EmulatedDevice) -> None:
    logits = normal(3)
    logits[0, 4000] = bad
    logits[1] = -np.inf
    tokens = check(device, logits, temperature=0.5)
    assert tokens[:2] == [NOT_FINITE, NOT_FINITE] and tokens[2] >= 0


def test_only_allowed_tokens_are_drawn(device: EmulatedDevice) -> None:
    """A grammar's bitmask: the draw is the host's from a row whose other logits are -inf."""
    logits = normal(8)
    allowed = np.random.RandomState(2).rand(8, N_VOCAB) < 0.01
    bits = np.zeros((8, -(-N_VOCAB // 32) * 32), bool)
    bits[:, :N_VOCAB] = allowed
    mask = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    masked = np.where(allowed, logits, -np.inf).astype(np.float32)
    for params in ({"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.8}):
        samplers = [SequenceSampler(SamplingParams(**params), seed=1, index=i, n_prompt=1) for i in range(8)]
        rows = [row for i, sampler in enumerate(samplers) if (row := sampler.on_device(i, [0]))]
        tokens = drawn(DeviceSampler(device, N_VOCAB, 8), device.array(logits), N_VOCAB, rows, mask).tokens
        assert tokens == [sampler.next(masked[i], [0]) for i, sampler in enumerate(samplers)]


def test_rows_in_any_order_with_a_stride(device: EmulatedDevice) -> None:
    wide = np.full((5, N_VOCAB + 13), np.float32(99))
    wide[:, :N_VOCAB] = normal(5)
    rows = [RowSampling(row=r) for r in (3, 0, 4)]
    tokens = drawn(DeviceSampler(device, N_VOCAB, 4), device.array(wide), N_VOCAB + 13, rows).tokens
    assert tokens == wide[[3, 0, 4], :N_VOCAB].argmax(1).tolist()


def test_logprobs_are_the_hosts(device: EmulatedDevice) -> None:
    logits = normal(4)
    logits[2, 100:110] = logits[2].max() + 1  # ties among the top
    rows = [
        RowSampling(row=i, temperature=1.0, number=0.3 + i / 10, n_logprobs=n) for i, n in enumerate((5, None, 20, 0))
    ]
    sampled = drawn(DeviceSampler(device, N_VOCAB, 4), device.array(logits), N_VOCAB, rows)
    assert sampled.logprobs[1] is None
    for i, n in ((0, 5), (2, 20), (3, 0)):
        found, token = sampled.logprobs[i], sampled.tokens[i]
        assert found is not None
        expected = token_logprobs(logits[i], token, n)
        assert found.rank == expected[token].rank
        assert found.logit - found.log_sum == pytest.approx(expected[token].logprob, abs=1e-5)
        others = {t: v - found.log_sum for t, v in zip(found.top_ids, found.top_logits, strict=True)}
        assert list({token: 0, **others}) == list(expected)
        for other, logprob in others.items():
            assert logprob == pytest.approx(expected[other].logprob, abs=1e-5)


def test_numbers_of_several_steps_are_the_hosts(device: EmulatedDevice) -> None:
    counters = [(5, 0, 17), (-(2**63), 3, 0), (2**63 - 1, 255, 2**20)]
    sampler = DeviceSampler(device, 10, 4, max_steps=50)
    sampler.upload([RowSampling(row=i, counter=counter) for i, counter in enumerate(counters)])
    device.launch(sampler.draw_all(3, 50))
    numbers = device.values(sampler._numbers, np.float64, 50, 3)
    assert numbers.tolist() == [
        [uniform(seed, index, position + s) for seed, index, position in counters] for s in range(50)
    ]
