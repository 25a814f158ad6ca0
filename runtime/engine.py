"""`Engine`: requests in, chunks out; every `step` runs one batch through the stage.

Single-threaded: one thread calls everything but `limits` and `stats`, which any thread may.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from pyinfer.errors import RequestError
from pyinfer.graph.backend import Stage, StageConfig
from pyinfer.graph.kv_groups import KVGroup
from pyinfer.graph.ops import F32Array
from pyinfer.runtime.admission import Admission
from pyinfer.runtime.batch_builder import BatchBuilder, Step
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.device_sampling import DeviceSampling, NewToken
from pyinfer.runtime.logprobs import token_logprobs
from pyinfer.runtime.outputs import (
    EngineStats,
    FinishReason,
    FloatMatrix,
    RequestFailure,
    RequestMetrics,
    RequestOutput,
)
from pyinfer.runtime.page_manager import ONE_GROUP
from pyinfer.runtime.page_moves import make_moves, moved_sequences
from pyinfer.runtime.plan import Plan, SchedulerConfig
from pyinfer.runtime.request import Request, Sequence, State
from pyinfer.runtime.request_events import RequestEvent
from pyinfer.runtime.request_limits import RequestLimits
from pyinfer.runtime.request_maker import RequestMaker
from pyinfer.runtime.sampler import NOT_FINITE, sample
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.scheduler import Scheduler
from pyinfer.runtime.vocabulary_facts import Vocabulary

_log = logging.getLogger(__name__)
_NO_LOGITS = np.empty((0, 0), np.float32)  # of a step whose tokens were drawn on the device
_NOT_FINITE = "the model's logits are not finite; its weights may be broken"


class Engine:
    """Scheduler, stage and sampler of one model."""

    def __init__(
        self,
        stage: Stage,
        config: StageConfig,
        vocabulary: Vocabulary,
        *,
        n_vocab: int | None = None,  # width of the logits, if the vocabulary's size is not it
        kv_groups: tuple[KVGroup, ...] = ONE_GROUP,  # the graph's
        seed: int = 0,
        prefix_caching: bool = True,
        policy: str = "priority",
        max_aging: float = 60.0,
        preemption_mode: str = "auto",
        n_swap_pages: int = 0,
        max_queue_wait: float | None = None,
        multi_step: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._stage = stage
        self._clock = clock
        self.scheduler = Scheduler(
            SchedulerConfig(
                config.block_size,
                config.max_tokens,
                config.max_sequences,
                prefix_caching,
                policy,
                preemption_mode,
                n_swap_pages,
                multi_step,
                max_aging,
            ),
            config.n_pages,
            clock,
            groups=kv_groups,
        )
        layout = self.scheduler.pages.layout
        self.n_ctx = min(config.n_ctx, layout.longest(config.n_pages))
        self.limits = RequestLimits(
            self.n_ctx, vocabulary.n_vocab if n_vocab is None else n_vocab, self.scheduler.policy.takes_priority
        )
        self._maker = RequestMaker(self.limits, vocabulary, seed=seed, clock=clock)
        self.admission = Admission(self.scheduler, max_queue_wait)
        self._builder = BatchBuilder(layout, self.scheduler.pool, max_sequences=config.max_sequences, n_ctx=self.n_ctx)
        self._device = DeviceSampling.of(stage)
        self._requests: dict[str, Request] = {}
        self._n_finished = 0
        self._n_steps = 0
        self._n_prompt_tokens = 0
        self._n_generated = 0

    # ---- requests

    def add_request(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        salt: str = "",
        route: str = "",
        bad_words: list[list[int]] | None = None,
        resume: list[list[int] | None] | None = None,
    ) -> None:
        """Queue a request; `RequestError` if it can never be served, `OverloadedError` if it would wait too long.

        Only requests of the same salt share pages. Those of a `route` are of a kind: the lengths of their answers say
        how long the next will be. `bad_words` are `spell_bad_words` of the parameters', where the vocabulary cannot
        encode. `resume` has what each sample produced in an engine that died, None for those that ended: they go on
        after it as if nothing had been.
        """
        request = self._maker.sampling(
            request_id, prompt, params, salt=salt, route=route, bad_words=bad_words, resume=resume
        )
        self._queue(request, may_refuse=resume is None)

    def add_scoring(self, request_id: str, token_ids: list[int]) -> None:
        """Queue ids whose logits are all wanted: `take_logits` has them once the chunk with a finish reason came."""
        self._queue(self._maker.scoring(request_id, token_ids), may_refuse=True)

    def add_beam_search(
        self, request_id: str, prompt: list[int], params: BeamSearchParams, *, salt: str = "", may_refuse: bool = True
    ) -> None:
        """Queue a beam search; its `beam_width` chunks come at its end, one a text, the best first."""
        self._queue(self._maker.beam_search(request_id, prompt, params, salt=salt), may_refuse=may_refuse)

    def _queue(self, request: Request, *, may_refuse: bool) -> None:
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use by a running request", param="request_id")
        if may_refuse:
            self.admission.check(request.sequences[0])
        self._requests[request.id] = request
        for sequence in request.sequences:
            self.scheduler.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> list[RequestOutput]:
        """End a request, or one of its samples, now; unknown and finished ones are left as they are."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        if request.is_finished:  # scored, and its logits were not taken
            del self._requests[request_id]
        if request.beams is not None:
            return self._end_search(request, [RequestOutput(request_id, i) for i in range(request.params.n)], "abort")
        sequences = [s for s in request.sequences if s.state is not State.FINISHED and index in (None, s.index)]
        return [self._end(sequence, RequestOutput(request_id, sequence.index), "abort") for sequence in sequences]

    # ---- steps

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def events(self) -> list[RequestEvent]:
        """What the last step did besides adding tokens."""
        return self.scheduler.events

    def step(self) -> list[RequestOutput]:
        """Run one batch; returns what it added. An error in the stage fails the requests of that batch, no others."""
        plan = self.scheduler.schedule()
        if not plan.sequences:
            return []
        try:
            make_moves(plan.moves, self._stage, self.scheduler.cost, self._clock)
            n_ahead = self.scheduler.n_repeats if self._device else 0
            step = self._builder.build(plan, n_ahead)
            start = self._clock()
            drawn = self._device.run(step, n_ahead) if self._device else None
            logits = self._stage.run(step.batch) if drawn is None else _NO_LOGITS
            self._note_time(step, 1 if drawn is None else len(drawn), self._clock() - start)
            self._score(step, logits)
            self._advance(plan)
            if drawn is None:
                self._fork_samples(step)
                drawn = [self._sample(step, logits)]
        except Exception as error:
            _log.exception("a step of %d sequences failed", len(plan.sequences))
            sequences = [*plan.sequences, *moved_sequences(plan.moves)]
            return self._fail(sequences, f"the engine failed while running this request: {error!r}")
        outputs = [output for sequence, row in step.searched for output in self._search(sequence, logits[row])]
        for sequence, *tokens in zip(step.sampled, *drawn, strict=True):
            if sequence.state is State.RUNNING:  # not so after a sibling's failure
                outputs += self._append(sequence, tokens)
        for sequence, *_ in step.scored:
            if not sequence.wants_next and sequence.n_scored == sequence.n_score_rows:
                outputs.append(self._end(sequence, RequestOutput(sequence.request.id), "length"))
        return outputs

    def _note_time(self, step: Step, n_steps: int, seconds: float) -> None:
        """Of one step, or of several that ran without coming back."""
        self._n_steps += n_steps
        self.scheduler.ran_ahead(n_steps - 1)
        self.scheduler.cost.note_computed(step.batch.n_tokens * n_steps, seconds)
        self.admission.note_step(step.batch.n_tokens, step.batch.n_sequences, seconds / n_steps)

    def _score(self, step: Step, logits: F32Array) -> None:
        """Take the rows that were wanted besides the sampled ones: whole for scoring, as logprobs for prompts."""
        for sequence, position, row, count in step.scored:
            if sequence.logits is not None:
                sequence.logits[position : position + count] = logits[row : row + count]
            elif sequence.prompt_logprobs is not None:
                n = sequence.request.params.prompt_logprobs or 0
                for i in range(count):
                    token = sequence.tokens[position + i + 1]
                    sequence.prompt_logprobs.append(token_logprobs(logits[row + i], token, n))
            sequence.n_scored = position + count

    def _fork_samples(self, step: Step) -> None:
        """A prompt was computed: its request's other samples go on from the same pages and the same logits."""
        for sequence, row in list(zip(step.sampled, step.sampled_rows, strict=True)):
            siblings = sequence.request.sequences
            if sequence.n_output > 0 or len(siblings) == 1:
                continue
            for sibling in siblings:
                if sibling.state is State.WAITING and sibling.n_output == 0 and self.scheduler.fork(sequence, sibling):
                    sibling.cached_tokens = sequence.cached_tokens
                    sibling.metrics.first_scheduled_time = self._clock()
                    step.sampled.append(sibling)
                    step.sampled_rows.append(row)

    def _search(self, sequence: Sequence, row: F32Array) -> list[RequestOutput]:
        """Take the logits of a beam; once all of its request have theirs, they advance or are told."""
        request, beams = sequence.request, sequence.request.beams
        assert beams is not None
        if sequence.state is not State.RUNNING:
            return []
        if not np.isfinite(row.max()):
            return self._fail([sequence], _NOT_FINITE)
        if sequence.metrics.first_token_time == 0.0:
            sequence.metrics.first_token_time = self._clock()
        beams.take(sequence, row)
        if not beams.is_ready:
            return []
        self._n_generated += len(request.sequences)
        return [] if beams.advance(self.scheduler) else self._end_search(request, beams.outputs(sequence))

    def _end_search(
        self, request: Request, outputs: list[RequestOutput], reason: FinishReason | None = None
    ) -> list[RequestOutput]:
        """End all beams; `outputs` are the search's last words, whose reasons may be given already."""
        for sequence in request.sequences:
            self.scheduler.finish(sequence)
        del self._requests[request.id]
        self._n_finished += 1
        metrics = request.sequences[0].metrics  # they share one
        metrics.finished_time = self._clock()
        for output in outputs:
            output.finish_reason = reason or output.finish_reason
            output.metrics = metrics
        return outputs

    def _sample(self, step: Step, logits: F32Array) -> list[NewToken]:
        samplers = [s.sampler for s in step.sampled if s.sampler is not None]
        assert len(samplers) == len(step.sampled)
        tokens = sample(logits, step.sampled_rows, samplers, [s.tokens for s in step.sampled])
        found: list[NewToken] = []
        for sequence, token, row in zip(step.sampled, tokens, step.sampled_rows, strict=True):
            params = sequence.request.params
            wants = params.needs_logprobs and token != NOT_FINITE
            found.append((token, token_logprobs(logits[row], token, params.logprobs or 0) if wants else None))
        return found

    def _advance(self, plan: Plan) -> None:
        advance = self.scheduler.advance
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            if count > 1 or not sequence.prompt_was_computed:
                self._n_prompt_tokens += count
                if sequence.metrics.first_scheduled_time == 0.0:
                    sequence.metrics.first_scheduled_time = self._clock()
            advance(sequence, count)

    def _append(self, sequence: Sequence, tokens: list[NewToken]) -> list[RequestOutput]:
        """Add what one step sampled, or several, up to where the sequence ends. It has advanced by the first step."""
        request = sequence.request
        output = RequestOutput(request.id, sequence.index, [], [] if request.params.needs_logprobs else None)
        for number, (token, logprobs) in enumerate(tokens):
            if number:
                self.scheduler.advance(sequence, 1)
            if token == NOT_FINITE:
                return [*([output] if number else []), *self._fail([sequence], _NOT_FINITE)]
            output.new_token_ids.append(token)
            if output.new_logprobs is not None and logprobs is not None:
                output.new_logprobs.append(logprobs)
            if sequence.n_output == 0:
                sequence.metrics.first_token_time = self._clock()
                output.cached_tokens = sequence.cached_tokens
                output.prompt_logprobs = sequence.prompt_logprobs
            sequence.tokens.append(token)
            self._n_generated += 1
            if token in sequence.stop_ids and sequence.n_output >= request.params.min_tokens:
                output.stop_token = token
                return [self._end(sequence, output, "stop")]
            if len(sequence.tokens) >= sequence.limit:
                return [self._end(sequence, output, "length")]
        return [output]

    def _end(self, sequence: Sequence, output: RequestOutput, reason: FinishReason | None) -> RequestOutput:
        self.scheduler.finish(sequence)
        sequence.metrics.finished_time = self._clock()
        if reason != "abort" and sequence.wants_next:
            self.scheduler.predictor.learn(sequence.request.route, sequence.n_prompt, sequence.n_output)
        output.finish_reason = reason
        output.metrics = sequence.metrics
        request = sequence.request
        if request.is_finished:
            self._n_finished += 1
            if sequence.logits is None or reason == "abort":  # else it stays for `take_logits`
                del self._requests[request.id]
        return output

    def _fail(self, sequences: list[Sequence], message: str) -> list[RequestOutput]:
        """End the whole requests that these sequences belong to, each with one chunk that says why."""
        failure = RequestFailure(message, "server_error", 500)
        outputs: list[RequestOutput] = []
        for request in {id(s.request): s.request for s in sequences}.values():
            for sequence in request.sequences:
                self.scheduler.finish(sequence)
            self._requests.pop(request.id, None)
            self._n_finished += 1
            metrics: RequestMetrics = request.sequences[0].metrics
            outputs.append(RequestOutput(request.id, failure=failure, metrics=metrics))
        return outputs

    def take_logits(self, request_id: str) -> FloatMatrix:
        """The logits of a finished `add_scoring`, float32 [n_tokens, n_vocab]; row i predicts token i + 1."""
        request = self._requests.pop(request_id)
        logits = request.sequences[0].logits
        assert logits is not None and request.is_finished
        return logits

    # ---- the rest

    def stats(self) -> EngineStats:
        scheduler, pool = self.scheduler, self.scheduler.pool
        held = pool.n_held
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_total=pool.n_pages,
            pages_used=held,
            pages_cached=pool.n_kept,
            kv_usage=held / pool.n_pages,
            prefix_queries=scheduler.pages.n_prefix_queries,
            prefix_hits=scheduler.pages.n_prefix_hits,
            preemptions=scheduler.n_preemptions,
            prompt_tokens=self._n_prompt_tokens,
            generation_tokens=self._n_generated,
            requests_finished=self._n_finished,
            steps=self._n_steps,
            swaps=scheduler.swap.n_swaps,
            refusals=self.admission.n_refused,
        )

    def check(self) -> None:
        """Assert that the books balance: no request is lost, no page leaks."""
        self.scheduler.check()
        queued = {id(s) for s in (*self.scheduler.waiting, *self.scheduler.running)}
        known = {id(s) for r in self._requests.values() for s in r.sequences if s.state is not State.FINISHED}
        assert queued == known, "requests leak"

    def close(self) -> None:
        """Stop the stage and give its memory back."""
        self._stage.close()
