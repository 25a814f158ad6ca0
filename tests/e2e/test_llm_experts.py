"""Mixtures of experts through `LLM`: llama.cpp's logits, and the same tokens alone, together, in chunks and on any threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llamacpp_logits
import numpy as np
import pytest
from tiny_models import TinyShape

from pyinfer import LLM, SamplingParams

pytestmark = pytest.mark.e2e

CASES = [case for case in llamacpp_logits.CASES if "expert" in case or "moe" in case]
PROMPTS: list[list[int]] = [np.random.RandomState(n).randint(0, 290, n).tolist() for n in (1, 3, 17, 40, 64, 5, 90, 33)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_llamacpps(case: str, tiny_model: Callable[..., Path]) -> None:
    arch, options = llamacpp_logits.CASES[case]
    with LLM(tiny_model(arch, "F32", **options), kv_cache_dtype="f32", n_threads=2) as llm:
        ours = llm.logits(llamacpp_logits.PROMPT)[llamacpp_logits.ROWS]
    with np.load(llamacpp_logits.DATA) as data:
        np.testing.assert_allclose(ours, data[case], atol=3e-5 * data[case].std(), rtol=0)


@pytest.mark.parametrize(
    "arch, shape",
    [("llama", TinyShape(n_experts=8)), ("qwen2moe", None), ("qwen3moe", TinyShape(n_experts=20, n_used=5))],
    ids=["llama", "qwen2moe", "qwen3moe"],
)
def test_tokens_do_not_depend_on_company_chunks_or_threads(
    arch: str, shape: TinyShape | None, tiny_model: Callable[..., Path]
) -> None:
    path = tiny_model(arch, "Q4_K", shape=shape)
    with LLM(path, n_threads=1, kv_cache_memory=16 << 20) as llm:
        alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert len({tuple(ids) for ids in alone}) > len(PROMPTS) // 2
    for n_threads, n_tokens in ((2, 512), (1, 16), (3, 37)):
        with LLM(
            path, n_threads=n_threads, max_num_batched_tokens=n_tokens, max_num_seqs=8, kv_cache_memory=16 << 20
        ) as llm:
            together = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
            llm.model.engine.check()
        assert together == alone, f"{n_threads} threads, {n_tokens} tokens a step"
