"""Requests of every kind, an engine that runs them, and all that a client learns of their answers."""

from __future__ import annotations

from typing import Any

import pytest
from fake_stage import FakeStage, FakeVocabulary
from plain_engine import prompt_of

from pyinfer.graph.backend import StageConfig
from pyinfer.runtime.engine import Engine
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.sampling_params import SamplingParams

CONFIG = StageConfig(n_pages=64, block_size=16, max_tokens=64, max_sequences=16, n_ctx=256)
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_k": 5, "top_p": 0.9},
    {"min_p": 0.1, "temperature": 0.7},
    {"logprobs": 3},
    {"logprobs": 0, "temperature": 0},
    {"logprobs": -1},
    {"logprobs": 6},  # more than the stage can
    {"typical_p": 0.6},
    {"n": 3, "top_k": 9},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"logit_bias": {4: 5.0, 9: -3.0}, "ignore_eos": True},
    {"min_tokens": 6, "stop_token_ids": [3, 4, 5]},
    {"bad_words": ["ab", "c"], "temperature": 0},
    {"prompt_logprobs": 2},
    {"stop_token_ids": list(range(20))},
]


def run(stage: FakeStage, requests: list[dict[str, Any]], config: StageConfig = CONFIG, **options: Any) -> tuple[
    dict[tuple[str, int], list[RequestOutput]], Engine
]:  # fmt: skip
    engine = Engine(stage, config, FakeVocabulary(), **options)
    for i, params in enumerate(requests):
        engine.add_request(str(i), prompt_of(3 + 13 * (i % 5), i), SamplingParams(seed=i, max_tokens=25, **params))
    chunks: dict[tuple[str, int], list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            chunks.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    return chunks, engine


def whole(chunks: list[RequestOutput]) -> tuple[Any, ...]:
    """All that a client learns but the times."""
    first, last = chunks[0], chunks[-1]
    tokens = [token for chunk in chunks for token in chunk.new_token_ids]
    logprobs = [
        {token: (pytest.approx(entry.logprob, abs=1e-5), entry.rank) for token, entry in each.items()}
        for chunk in chunks
        for each in chunk.new_logprobs or ()
    ]
    assert len(logprobs) in (0, len(tokens))
    return (
        tokens,
        logprobs,
        last.finish_reason,
        last.stop_token,
        first.cached_tokens,
        first.prompt_logprobs,
        last.failure,
    )
