"""LLM over the CPU kernels: the same results alone, together, in chunks, from the cache and after a preemption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import MODELS, golden_prompts

from pyinfer import LLM, BeamSearchParams, SamplingParams
from pyinfer.errors import ConfigError, EngineError, ModelNotFoundError, RequestError
from pyinfer.runtime.outputs import GenerationOutput

pytestmark = pytest.mark.e2e
GREEDY = SamplingParams(temperature=0, max_tokens=12)
TEXTS = [
    "Once upon a time",
    "The capital of France is Paris. The capital of Japan is",
    "def fibonacci(n):",
    "1, 2, 3, 4,",
    "Water boils at",
    "In the year 1969",
    "She said: “no”, and",
    "a",
]


@pytest.fixture(scope="module")
def path(model_path: Callable[[str], Path]) -> Path:
    return model_path("smollm2")


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, n_ctx=1024, kv_cache_memory=64 << 20) as opened:
        yield opened
        opened.model.engine.check()
        assert opened.stats().pages_used == 0


def ids_of(outputs: list[GenerationOutput]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_as_near_to_exact_as_llamacpps(model: str, model_path: Callable[[str], Path]) -> None:
    prompts = golden_prompts(model)
    with LLM(model_path(model), kv_cache_memory=64 << 20) as opened:
        ours = {name: prompt.kl(opened.logits(prompt.ids)) for name, prompt in prompts.items()}
    weights = [len(prompt.ids) for prompt in prompts.values()]
    theirs = np.average([prompt.llamacpp_kl for prompt in prompts.values()], weights=weights)
    assert np.average([kl.mean() for kl in ours.values()], weights=weights) <= theirs
    for name, prompt in prompts.items():
        if len(prompt.ids) > 100:
            assert ours[name].mean() <= 1.3 * prompt.llamacpp_kl, name


def test_answers_a_question(llm: LLM) -> None:
    question = {"role": "user", "content": "Which city is the capital of France? Answer with one word."}
    [output] = llm.chat([question], SamplingParams(temperature=0, max_tokens=20))
    assert "Paris" in output.outputs[0].text
    assert output.prompt is not None and question["content"] in output.prompt


def test_batch_equals_one_by_one(llm: LLM) -> None:
    for params in (GREEDY, SamplingParams(seed=3, max_tokens=12, n=2), SamplingParams(seed=1, top_k=20, max_tokens=12)):
        together = llm.generate(TEXTS, params)
        assert ids_of(together) == [ids_of(llm.generate(text, params))[0] for text in TEXTS]
        assert [output.prompt for output in together] == TEXTS
        for output in together:
            for sample in output.outputs:
                assert (
                    sample.text
                    == llm.detokenize([*output.prompt_token_ids, *sample.token_ids])[len(output.prompt or "") :]
                )


def test_logits_are_bit_equal_in_chunks_and_in_a_batch(path: Path, llm: LLM) -> None:
    ids = golden_prompts("smollm2")["facts"].ids
    whole = llm.logits(ids)
    assert whole.dtype == np.float32 and whole.shape == (len(ids), 49152)
    for i, logits in enumerate(llm.logits([ids[i:] + ids[:i] for i in range(8)])):
        assert i > 0 or (logits == whole).all()
    for chunk in (1, 7, 16):
        with LLM(path, n_ctx=1024, kv_cache_memory=64 << 20, max_num_batched_tokens=chunk) as other:
            assert (other.logits(ids) == whole).all(), chunk


def test_prefix_cache_and_preemption_change_nothing(path: Path, llm: LLM) -> None:
    prompts = [golden_prompts("smollm2")["story"].ids[: 40 - i] for i in range(4)]
    params = SamplingParams(seed=5, max_tokens=40, ignore_eos=True, logprobs=2)
    expected = [llm.generate(prompt, params)[0] for prompt in prompts]
    for mode in ("recompute", "swap"):
        options = {"preemption_mode": mode, "swap_space": 40 * 16 * 23040}
        with LLM(path, kv_cache_memory=9 * 16 * 23040, max_num_batched_tokens=24, **options) as small:
            assert small.n_ctx == 144
            crowded = small.generate(prompts, params)
            stats = small.stats()
            assert stats.preemptions > 0 and stats.swaps == (stats.preemptions if mode == "swap" else 0)
            again = small.generate(prompts[0], params)[0]
            assert again.num_cached_tokens == 32
        assert ids_of(crowded) == ids_of(expected)
        assert [o.outputs[0].logprobs for o in crowded] == [o.outputs[0].logprobs for o in expected]
        assert again.outputs[0].logprobs == expected[0].outputs[0].logprobs


def test_forked_samples_are_those_that_compute_their_prompts_themselves(path: Path, llm: LLM) -> None:
    params = SamplingParams(seed=4, max_tokens=20, n=4, logprobs=1)
    prompts = [golden_prompts("smollm2")["story"].ids[:n] for n in (32, 37)]
    forked = llm.generate(prompts, params)
    with LLM(path, n_ctx=256, kv_cache_memory=16 << 20, max_num_seqs=1, enable_prefix_caching=False) as one_by_one:
        apart = one_by_one.generate(prompts, params)
    assert ids_of(forked) == ids_of(apart)
    for ours, theirs in zip(forked, apart, strict=True):
        assert [sample.logprobs for sample in ours.outputs] == [sample.logprobs for sample in theirs.outputs]


def test_logprobs_belong_to_the_logits(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=1, seed=0)
    [output] = llm.generate(TEXTS[1], params)
    sample = output.outputs[0]
    ids = [*output.prompt_token_ids, *sample.token_ids]
    rows = llm.logits(ids).astype(np.float64)
    exact = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    assert output.prompt_logprobs is not None and sample.logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    chosen = [*output.prompt_logprobs[1:], *sample.logprobs]
    for i, (entries, token) in enumerate(zip(chosen, ids[1:], strict=True)):
        assert entries is not None and next(iter(entries)) == token
        best = int(exact[i].argmax())
        assert entries[best].rank == 1
        for other, entry in entries.items():
            assert abs(entry.logprob - exact[i, other]) < 1e-4
            assert entry.decoded_token == llm.detokenize([other], skip_special=False)
    total = sum(entries[token].logprob for entries, token in zip(sample.logprobs, sample.token_ids, strict=True))
    assert sample.cumulative_logprob == pytest.approx(total)


def test_stop_strings_cut_and_stop_ids_end(llm: LLM) -> None:
    whole = llm.generate(TEXTS[3], SamplingParams(temperature=0, max_tokens=30))[0].outputs[0]
    stop = whole.text[6:9]
    cut = llm.generate(TEXTS[3], SamplingParams(temperature=0, max_tokens=30, stop=stop))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and stop in llm.detokenize(cut.token_ids)
    token = whole.token_ids[4]
    ended = llm.generate(TEXTS[3], SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[token]))[0].outputs[0]
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)


def test_bad_words_do_not_come_up(llm: LLM) -> None:
    plain = llm.generate(TEXTS[1], GREEDY)[0].outputs[0].text
    word = plain.split()[0].strip(".,")
    assert word not in llm.generate(TEXTS[1], GREEDY.replace(bad_words=[word]))[0].outputs[0].text


def test_best_of_is_the_likeliest_of_its_samples(llm: LLM) -> None:
    params = SamplingParams(seed=2, max_tokens=5, n=5, logprobs=0)
    samples = llm.generate(TEXTS[0], params)[0].outputs
    [best] = llm.generate(TEXTS[0], params.replace(n=1, best_of=5))[0].outputs
    assert best.token_ids == max(samples, key=lambda s: s.cumulative_logprob or 0).token_ids


def test_all_forms_of_prompts(llm: LLM) -> None:
    ids = [llm.tokenize(text) for text in TEXTS[:2]]
    expected = ids_of(llm.generate(TEXTS[:2], GREEDY))
    assert ids_of(llm.generate(ids, GREEDY)) == expected
    array: Any = np.array(ids[0])
    assert ids_of(llm.generate(ids[0], GREEDY)) == ids_of(llm.generate(array, GREEDY)) == expected[:1]
    assert ids_of(llm.generate(TEXTS[:2], [GREEDY, GREEDY])) == expected
    assert llm.generate([]) == []
    two = llm.chat([[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Bye"}]], GREEDY)
    assert ids_of(two)[1] == ids_of(llm.chat([{"role": "user", "content": "Bye"}], GREEDY))[0]
    metrics = two[0].metrics
    assert metrics is not None
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time


def test_mistakes_are_named_and_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"context of 1024"):
        llm.generate([[1], [1] * 1024], GREEDY)
    with pytest.raises(RequestError, match=r"1025.*1024"):
        llm.logits([1] * 1025)
    with pytest.raises(RequestError, match="49152"):
        llm.logits([[1], [49152]])
    with pytest.raises(RequestError, match="not text"):
        llm.logits("text")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="empty"):
        llm.logits([])
    with pytest.raises(RequestError, match="2 sampling_params for 1"):
        llm.generate("a", [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="float"):
        llm.generate([1.5], GREEDY)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="integers"):
        llm.generate([[1, 1.5]], GREEDY)  # type: ignore[arg-type]
    assert llm.stats().running == llm.stats().waiting == 0


def test_bad_options_and_closed_models_say_so(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"9000.*8192"):
        LLM(path, n_ctx=9000)
    with pytest.raises(ConfigError, match="n_batch"):
        LLM(path, n_batch=3)
    with pytest.raises(ModelNotFoundError):
        LLM("no-such-model")
    with LLM(path, n_ctx=256, kv_cache_memory=8 << 20) as closed:
        pass
    closed.close()
    with pytest.raises(EngineError, match="closed"):
        closed.generate("a")


def test_beam_search_over_forks_is_that_over_whole_texts(path: Path, llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    prompts = [golden_prompts("smollm2")["story"].ids[:21], llm.tokenize(TEXTS[1])]
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        beams: list[tuple[list[int], float]] = [(prompt, 0.0)]
        done: list[tuple[list[int], float]] = []
        for _ in range(params.max_tokens):
            grown: list[tuple[list[int], float]] = []
            for (tokens, total), rows in zip(beams, llm.logits([tokens for tokens, _ in beams]), strict=True):
                exact = rows[-1].astype(np.float64)
                exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
                for token in np.argsort(-exact, kind="stable")[:6].tolist():
                    ends = token in llm.model.tokenizer.eog_ids
                    (done if ends else grown).append((tokens if ends else [*tokens, token], total + exact[token]))
            beams = sorted(grown, key=lambda b: b[1], reverse=True)[:3]
        expected = sorted(done + beams, key=lambda b: b[1] / len(b[0]), reverse=True)[:3]
        assert [sequence.tokens for sequence in output.sequences] == [tokens for tokens, _ in expected]
        for sequence, (tokens, total) in zip(output.sequences, expected, strict=True):
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
            assert sequence.text == llm.detokenize(tokens)
    with pytest.raises(RequestError, match="context of 1024"):
        llm.beam_search([[1] * 1024], params)
