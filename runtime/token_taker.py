"""`TokenTaker`: what a step's tokens do to their sequences: each gets its own, and ends where it has to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyinfer.graph.ops import F32Array
from pyinfer.runtime.device_sampling import NewToken
from pyinfer.runtime.outputs import RequestOutput
from pyinfer.runtime.request import Sequence, State
from pyinfer.runtime.running_requests import RunningRequests
from pyinfer.runtime.sampler import NOT_FINITE
from pyinfer.runtime.scheduler import Scheduler

_NOT_FINITE = "the model's logits are not finite; its weights may be broken"


class TokenTaker:
    def __init__(self, scheduler: Scheduler, requests: RunningRequests, clock: Callable[[], float]) -> None:
        self._scheduler, self._requests, self._clock = scheduler, requests, clock
        self.n_generated = 0

    def append(self, sequence: Sequence, tokens: list[NewToken]) -> list[RequestOutput]:
        """Add what one step sampled, or several, up to where the sequence ends. It has advanced by the first step."""
        request = sequence.request
        output = RequestOutput(request.id, sequence.index, [], [] if request.params.needs_logprobs else None)
        for number, (token, logprobs) in enumerate(tokens):
            if number:
                self._scheduler.advance(sequence, 1)
            if token == NOT_FINITE:
                return [*([output] if number else []), *self._requests.fail([sequence], _NOT_FINITE)]
            output.new_token_ids.append(token)
            if output.new_logprobs is not None and logprobs is not None:
                output.new_logprobs.append(logprobs)
            if sequence.n_output == 0:
                sequence.metrics.first_token_time = self._clock()
                output.cached_tokens = sequence.cached_tokens
                output.prompt_logprobs = sequence.prompt_logprobs
            sequence.tokens.append(token)
            self.n_generated += 1
            if token in sequence.stop_ids and sequence.n_output >= request.params.min_tokens:
                output.stop_token = token
                return [self._requests.end(sequence, output, "stop")]
            if len(sequence.tokens) >= sequence.limit:
                return [self._requests.end(sequence, output, "length")]
        return [output]

    def search(self, sequence: Sequence, row: F32Array) -> list[RequestOutput]:
        """Take the logits of a beam; once all of its request have theirs, they advance or are told."""
        request, beams = sequence.request, sequence.request.beams
        assert beams is not None
        if sequence.state is not State.RUNNING:
            return []
        if not np.isfinite(row.max()):
            return self._requests.fail([sequence], _NOT_FINITE)
        if sequence.metrics.first_token_time == 0.0:
            sequence.metrics.first_token_time = self._clock()
        beams.take(sequence, row)
        if not beams.is_ready:
            return []
        self.n_generated += len(request.sequences)
        return [] if beams.advance(self._scheduler) else self._requests.end_search(request, beams.outputs(sequence))
