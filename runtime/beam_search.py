"""Beam search: of all that may follow the best texts so far, keep the best; vLLM's parameters, steps and scores.

Beams advance together. Each that has its logits names its likeliest continuations and pauses; when all have, the best
`beam_width` of them go on: one on the pages of its parent, the others on forks of it (`Scheduler.fork`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyinfer.graph.ops import F32Array
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.logprobs import token_logprobs
from pyinfer.runtime.outputs import FinishReason, RequestOutput, TokenLogprobs
from pyinfer.runtime.request import Request, Sequence
from pyinfer.runtime.scheduler import Scheduler


@dataclass(slots=True)
class _FinishedBeam:
    output: list[int]
    logprobs: list[TokenLogprobs]
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason
    stop_token: int | None = None


@dataclass(slots=True)
class _Beam:
    sequence: Sequence
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    candidates: TokenLogprobs | None = None  # None until its logits are there


@dataclass(slots=True)
class _Continuation:
    score: float
    parent: _Beam
    token: int
    cumulative_logprob: float
    logprobs: TokenLogprobs


class BeamSearch:
    """One request's beams, which are `request.sequences`."""

    def __init__(self, params: BeamSearchParams, request: Request, end_ids: frozenset[int]) -> None:
        self._params = params
        self._request = request
        self._end_ids = frozenset() if params.ignore_eos else end_ids
        [first] = request.sequences
        self._beams = {first.index: _Beam(first)}
        self._n_made = 1
        self._finished: list[_FinishedBeam] = []

    def take(self, sequence: Sequence, row: F32Array) -> None:
        """Note what may follow a beam, whose next logits are `row` [n_vocab], and pause it."""
        if self._params.temperature not in (0.0, 1.0):
            row = row / np.float32(self._params.temperature)
        n = min(2 * self._params.beam_width, row.size)
        self._beams[sequence.index].candidates = token_logprobs(row, int(row.argmax()), n)
        sequence.is_paused = True

    @property
    def is_ready(self) -> bool:
        """Every beam has its candidates."""
        return all(beam.candidates is not None for beam in self._beams.values())

    def advance(self, scheduler: Scheduler) -> bool:
        """Choose the next beams and put them into the scheduler; False if the search is over."""
        best = self._choose()
        if not best or self._is_decided(best):
            return False
        chosen: dict[int, list[_Continuation]] = {}
        for continuation in best:
            chosen.setdefault(continuation.parent.sequence.index, []).append(continuation)
        for index, beam in self._beams.items():
            if index not in chosen:
                scheduler.finish(beam.sequence)  # before the forks, which need its place
        beams = [self._go_on(c, scheduler, is_last=c is group[-1]) for group in chosen.values() for c in group]
        self._beams = {beam.sequence.index: beam for beam in beams}
        self._request.sequences[:] = [beam.sequence for beam in beams]
        return True

    def _choose(self) -> list[_Continuation]:
        """The best continuations that go on, at most `beam_width`; those that end are put aside."""
        params = self._params
        best: list[_Continuation] = []
        for beam in self._beams.values():
            tokens = beam.sequence.tokens
            for token, entry in (beam.candidates or {}).items():
                total = beam.cumulative_logprob + entry.logprob
                logprobs = {token: entry}
                if token in self._end_ids:
                    kept = [token] if params.include_stop_str_in_output else []
                    self._finish(beam, kept, [logprobs], total, params.score(total, len(tokens)), "stop", token)
                else:
                    best.append(_Continuation(params.score(total, len(tokens) + 1), beam, token, total, logprobs))
        best.sort(key=lambda c: c.score, reverse=True)
        best = best[: params.beam_width]
        if best and len(best[0].parent.sequence.tokens) + 1 >= best[0].parent.sequence.limit:
            for c in best:
                self._finish(c.parent, [c.token], [c.logprobs], c.cumulative_logprob, c.score, "length")
            return []
        return best

    def _finish(
        self,
        beam: _Beam,
        token_ids: list[int],
        logprobs: list[TokenLogprobs],
        total: float,
        score: float,
        reason: FinishReason,
        stop_token: int | None = None,
    ) -> None:
        output = beam.sequence.tokens[beam.sequence.n_prompt :] + token_ids
        self._finished.append(_FinishedBeam(output, beam.logprobs + logprobs, total, score, reason, stop_token))
        self._finished.sort(key=lambda f: f.score, reverse=True)
        del self._finished[self._params.beam_width :]

    def _is_decided(self, best: list[_Continuation]) -> bool:
        """Enough texts are complete, and none can still come among the best: a logprob only falls, so it has a bound."""
        if len(self._finished) < self._params.beam_width:
            return False
        if self._params.early_stopping:
            return True
        total = max(c.cumulative_logprob for c in best)
        sequence = best[0].parent.sequence
        bound = max(self._params.score(total, n) for n in (len(sequence.tokens) + 1, sequence.limit))
        return bound < self._finished[-1].score

    def _go_on(self, c: _Continuation, scheduler: Scheduler, *, is_last: bool) -> _Beam:
        """The parent's last continuation takes its place, the others fork from it before."""
        parent = c.parent.sequence
        sequence = parent
        if not is_last:
            sequence = Sequence(self._request, self._n_made, limit=parent.limit)
            self._n_made += 1
            sequence.tokens = list(parent.tokens)
            sequence.cached_tokens = parent.cached_tokens
            sequence.metrics = parent.metrics
            scheduler.add(sequence)
            scheduler.fork(parent, sequence)
        sequence.tokens.append(c.token)
        sequence.is_paused = False
        return _Beam(sequence, c.cumulative_logprob, [*c.parent.logprobs, c.logprobs])

    def outputs(self, last: Sequence) -> list[RequestOutput]:
        """`beam_width` chunks, one a text, best first, of a search that is over; `last` knows the times."""
        assert len(self._finished) == self._params.beam_width
        return [
            RequestOutput(
                self._request.id,
                index,
                new_token_ids=beam.output,
                new_logprobs=beam.logprobs,
                finish_reason=beam.finish_reason,
                stop_token=beam.stop_token,
                cached_tokens=last.cached_tokens,
                metrics=last.metrics,
                cumulative_logprob=beam.cumulative_logprob,
            )
            for index, beam in enumerate(self._finished)
        ]
