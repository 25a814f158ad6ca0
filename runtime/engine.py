"""`Engine`: requests in, chunks out; every `step` runs one batch through the stage.

Single-threaded: one thread calls everything but `limits` and `stats`, which any thread may.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from pyinfer.errors import DeviceLostError
from pyinfer.graph.backend import Stage, StageConfig
from pyinfer.graph.kv_groups import KVGroup
from pyinfer.runtime.admission import Admission
from pyinfer.runtime.batch_builder import BatchBuilder, Step
from pyinfer.runtime.beam_search_params import BeamSearchParams
from pyinfer.runtime.device_sampling import DeviceSampling, Flight
from pyinfer.runtime.outputs import EngineStats, FloatMatrix, RequestOutput
from pyinfer.runtime.page_manager import ONE_GROUP
from pyinfer.runtime.page_moves import make_moves, moved_sequences
from pyinfer.runtime.plan import Plan, SchedulerConfig
from pyinfer.runtime.request import Request, Sequence, State
from pyinfer.runtime.request_events import RequestEvent
from pyinfer.runtime.request_limits import RequestLimits
from pyinfer.runtime.request_maker import RequestMaker
from pyinfer.runtime.running_requests import RunningRequests
from pyinfer.runtime.sampling_params import SamplingParams
from pyinfer.runtime.scheduler import Scheduler
from pyinfer.runtime.step_rows import fork_samples, sample_rows, score
from pyinfer.runtime.token_taker import TokenTaker
from pyinfer.runtime.vocabulary_facts import Vocabulary

_log = logging.getLogger(__name__)
_NO_LOGITS = np.empty((0, 0), np.float32)  # of a step whose tokens were drawn on the device


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
        overlap: bool = True,  # start a step before the last one's tokens are known, where the stage can
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
        self._device = DeviceSampling.of(stage, config.max_sequences)
        self._requests = RunningRequests(self.scheduler, clock)
        self._taker = TokenTaker(self.scheduler, self._requests, clock)
        self._overlaps = overlap and multi_step == 1 and self._device is not None and self._device.can_overlap
        self._flight: Flight | None = None  # the step that the device works on between two calls of `step`
        self._landed = 0.0  # when the last one ended
        self._unforeseen: set[Request] = set()  # those whose rows wait for tokens
        self._n_steps = 0
        self._n_prompt_tokens = 0

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
        self._requests.check_id(request.id)
        if may_refuse:
            self.admission.check(request.sequences[0])
        self._requests.add(request)
        if self._overlaps and self._device is not None and self._device.needs_its_tokens(request):
            self._unforeseen.add(request)

    def abort(self, request_id: str, index: int | None = None) -> list[RequestOutput]:
        """End a request, or one of its samples, now; unknown and finished ones are left as they are."""
        return self._requests.abort(request_id, index)

    def take_logits(self, request_id: str) -> FloatMatrix:
        """The logits of a finished `add_scoring`, float32 [n_tokens, n_vocab]; row i predicts token i + 1."""
        return self._requests.take_logits(request_id)

    # ---- steps

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def events(self) -> list[RequestEvent]:
        """What the last step did besides adding tokens."""
        return self.scheduler.events

    def step(self) -> list[RequestOutput]:
        """Run one batch; returns what it added. An error in the stage fails the requests of that batch, no others; a lost
        device ends the engine (DeviceLostError).

        Where stage and requests allow it the next batch is started first, so that the device goes on while the host
        looks at this one's tokens.
        """
        flight, self._flight = self._flight, None
        if self._unforeseen:
            self._unforeseen = {request for request in self._unforeseen if not request.is_finished}
        if not self._overlaps or self._unforeseen:
            return self._run() if flight is None else self._land(flight)
        outputs: list[RequestOutput] = []
        events: list[RequestEvent] = []
        if flight is None:
            flight = self._launch(outputs)
            events = self.scheduler.events
        if flight is not None:
            self._flight = self._launch(outputs)
            outputs += self._land(flight)
            self.scheduler.events[:0] = events
        return outputs

    def _launch(self, outputs: list[RequestOutput]) -> Flight | None:
        """Start a batch, as if nobody ended in the one in flight; None, with failures in `outputs`, if there is none."""
        assert self._device is not None
        plan = self.scheduler.schedule()
        try:
            make_moves(plan.moves, self._stage, self.scheduler.cost, self._clock)
            if not plan.sequences:
                return None
            step = self._builder.build(plan)
            ticket = self._device.start(step)
        except Exception as error:
            outputs += self._fail([*plan.sequences, *moved_sequences(plan.moves)], error)
            return None
        self._advance(plan, self.scheduler.started)
        for row, sequence in enumerate(step.sampled):
            sequence.n_coming += 1
            sequence.coming_row = row
        return Flight(plan, step, ticket, self._clock())

    def _land(self, flight: Flight) -> list[RequestOutput]:
        """Wait for a batch in flight. Who has ended since it was started gets nothing of it."""
        assert self._device is not None
        plan, step = flight.plan, flight.step
        try:
            tokens = self._device.fetch(flight.ticket)
        except Exception as error:
            return self._fail(plan.sequences, error)
        now = self._clock()
        self._note_time(step, 1, now - max(flight.started, self._landed))
        self._landed = now
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            self.scheduler.landed(sequence, count)
        outputs: list[RequestOutput] = []
        for sequence, token in zip(step.sampled, tokens, strict=True):
            if sequence.state is not State.FINISHED:
                sequence.n_coming -= 1
                outputs += self._taker.append(sequence, [token])
        return outputs

    def _fail(self, sequences: list[Sequence], error: Exception) -> list[RequestOutput]:
        if isinstance(error, DeviceLostError):
            raise error  # every step would fail: this process ends, and the one that takes over has the requests
        _log.exception("a step of %d sequences failed", len(sequences))
        left = [sequence for sequence in sequences if sequence.state is not State.FINISHED]
        return self._requests.fail(left, f"the engine failed while running this request: {error!r}")

    def _run(self) -> list[RequestOutput]:
        """One batch from its plan to its tokens."""
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
            score(step, logits)
            self._advance(plan, self.scheduler.advance)
            if drawn is None:
                fork_samples(step, self.scheduler, self._clock())
                drawn = [sample_rows(step, logits)]
        except Exception as error:
            return self._fail([*plan.sequences, *moved_sequences(plan.moves)], error)
        outputs = [output for sequence, row in step.searched for output in self._taker.search(sequence, logits[row])]
        for sequence, *tokens in zip(step.sampled, *drawn, strict=True):
            if sequence.state is State.RUNNING:  # not so after a sibling's failure
                outputs += self._taker.append(sequence, tokens)
        for sequence, *_ in step.scored:
            if not sequence.wants_next and sequence.n_scored == sequence.n_score_rows:
                outputs.append(self._requests.end(sequence, RequestOutput(sequence.request.id), "length"))
        return outputs

    def _note_time(self, step: Step, n_steps: int, seconds: float) -> None:
        """Of one step, or of several that ran without coming back."""
        self._n_steps += n_steps
        self.scheduler.ran_ahead(n_steps - 1)
        self.scheduler.cost.note_computed(step.batch.n_tokens * n_steps, seconds)
        self.admission.note_step(step.batch.n_tokens, step.batch.n_sequences, seconds / n_steps)

    def _advance(self, plan: Plan, advance: Callable[[Sequence, int], None]) -> None:
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            if count > 1 or sequence.n_computed < sequence.n_prompt:
                self._n_prompt_tokens += count
                if sequence.metrics.first_scheduled_time == 0.0:
                    sequence.metrics.first_scheduled_time = self._clock()
            advance(sequence, count)

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
            generation_tokens=self._taker.n_generated,
            requests_finished=self._requests.n_finished,
            steps=self._n_steps,
            swaps=scheduler.swap.n_swaps,
            refusals=self.admission.n_refused,
        )

    def check(self) -> None:
        """Assert that the books balance: no request is lost, no page leaks."""
        self.scheduler.check()
        self._requests.check()

    def close(self) -> None:
        """Stop the stage and give its memory back."""
        self._stage.close()
