"""What the engine must say, by plain loops over whole texts: no pages, no scheduler, no forks."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
from fake_stage import END, N_VOCAB, FakeStage

from pyinfer.graph.backend import StageConfig
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.sampler import SequenceSampler
from pyinfer.runtime.sampling_params import SamplingParams

_STAGE = FakeStage(StageConfig(n_pages=1))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(N_VOCAB), k=length)


def alone(
    prompt: list[int], params: SamplingParams, index: int = 0, n_ctx: int = 256, stage: FakeStage = _STAGE
) -> list[int]:
    """The output of one sample."""
    sampler = SequenceSampler(params, seed=params.seed or 0, index=index, n_prompt=len(prompt), eog_ids=[END])
    tokens = list(prompt)
    while len(tokens) - len(prompt) < (params.max_tokens or n_ctx) and len(tokens) < n_ctx:
        tokens.append(sampler.next(stage.logits_after(np.array(tokens)), tokens))
        ended = tokens[-1] in (params.stop_token_ids or []) or (tokens[-1] == END and not params.ignore_eos)
        if ended and len(tokens) - len(prompt) >= params.min_tokens:
            break
    return tokens[len(prompt) :]


def beams_alone(
    prompt: list[int], params: BeamSearchParams, n_ctx: int = 256, stage: FakeStage = _STAGE
) -> list[tuple[list[int], float]]:
    """vLLM's loop, ended early only if asked for: outputs and their logprobs, best first."""
    beams = [(list(prompt), 0.0)]
    done: list[tuple[list[int], float, float]] = []

    def score(tokens: list[int], total: float) -> float:
        return float(total / len(tokens) ** params.length_penalty)

    for _ in range(min(params.max_tokens, n_ctx - len(prompt))):
        grown = []
        for tokens, total in beams:
            logprobs = _log_softmax(stage.logits_after(np.array(tokens)))
            for token in np.argsort(-logprobs, kind="stable")[: 2 * params.beam_width].tolist():
                if token == END and not params.ignore_eos:
                    done.append((tokens, total + logprobs[token], score(tokens, total + logprobs[token])))
                else:
                    grown.append(([*tokens, token], total + logprobs[token]))
        beams = sorted(grown, key=lambda b: score(*b), reverse=True)[: params.beam_width]
        if params.early_stopping and len(done) >= params.beam_width:
            beams = []
            break
    done += [(tokens, total, score(tokens, total)) for tokens, total in beams]
    best = sorted(done, key=lambda d: d[2], reverse=True)[: params.beam_width]
    return [(tokens[len(prompt) :], float(total)) for tokens, total, _ in best]


def _log_softmax(row: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    exact = row.astype(np.float64)
    shifted = exact - exact.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
