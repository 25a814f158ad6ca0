"""`RequestMaker`: turns what a client asks for into a `Request` with its `Sequence`s, ready to be queued."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from pyinfer.runtime.beam_search import BeamSearch
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.request import Request, Sequence
from pyinfer.runtime.request_limits import RequestLimits
from pyinfer.runtime.sample_masks import spell_bad_words
from pyinfer.runtime.sampler import SequenceSampler
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.vocabulary_facts import Vocabulary

_SCORING = SamplingParams(temperature=0.0, max_tokens=1)


class RequestMaker:
    """Every method raises `RequestError` for what can never be served."""

    def __init__(self, limits: RequestLimits, vocabulary: Vocabulary, *, seed: int, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._vocabulary = vocabulary
        self._seeds = random.Random(seed)
        self._clock = clock
        self._n_made = 0

    def sampling(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        salt: str = "",
        route: str = "",
        bad_words: list[list[int]] | None = None,
        resume: list[list[int] | None] | None = None,
    ) -> Request:
        """See `Engine.add_request`."""
        self._limits.check(prompt, params)
        request = self._request(request_id, prompt, params, salt, route)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        if bad_words is None:
            bad_words = spell_bad_words(params.bad_words or (), self._vocabulary)
        ends = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            ends |= self._vocabulary.eog_ids
        for index in range(params.n_samples):
            output = resume[index] if resume is not None else []
            if output is None:
                continue
            leader = request.sequences[0] if request.sequences else None
            sequence = Sequence(request, index, limit=self._limit(prompt, params.max_tokens), leader=leader)
            sequence.tokens += output
            sequence.stop_ids = ends
            sequence.sampler = SequenceSampler(
                params,
                seed=seed,
                index=index,
                n_prompt=len(prompt),
                eog_ids=self._vocabulary.eog_ids,
                bad_words=bad_words,
            )
            if params.prompt_logprobs is not None and index == 0 and not output:  # they come with the first token
                sequence.reads_cache = False
                sequence.n_score_rows = len(prompt) - 1
                sequence.prompt_logprobs = [None]
            request.sequences.append(sequence)
        return request

    def scoring(self, request_id: str, token_ids: list[int]) -> Request:
        """All logits of these ids, and no token more."""
        self._limits.check_scoring(token_ids)
        request = self._request(request_id, token_ids, _SCORING)
        sequence = Sequence(request, 0, limit=len(token_ids))
        sequence.reads_cache = sequence.wants_next = False
        sequence.n_score_rows = len(token_ids)
        sequence.logits = np.empty((len(token_ids), self._limits.n_vocab), np.float32)
        request.sequences.append(sequence)
        return request

    def beam_search(self, request_id: str, prompt: list[int], params: BeamSearchParams, *, salt: str = "") -> Request:
        self._limits.check_beam_search(prompt, params)
        request = self._request(request_id, prompt, params.sampling, salt)
        request.sequences.append(Sequence(request, 0, limit=self._limit(prompt, params.max_tokens)))
        request.beams = BeamSearch(params, request, self._vocabulary.eog_ids)
        return request

    def _limit(self, prompt: list[int], max_tokens: int | None) -> int:
        n_ctx = self._limits.n_ctx
        return n_ctx if max_tokens is None else min(n_ctx, len(prompt) + max_tokens)

    def _request(
        self, request_id: str, prompt: list[int], params: SamplingParams, salt: str = "", route: str = ""
    ) -> Request:
        self._n_made += 1
        return Request(request_id, prompt, params, self._n_made, salt=salt, route=route, clock=self._clock)
