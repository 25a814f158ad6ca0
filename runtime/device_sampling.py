"""`DeviceSampling`: steps whose tokens are drawn where the logits are, by a `SamplingStage`; only ids come back.

Whole rows are still taken where somebody needs them: prompts that are scored, beams, samples that fork, typical_p.

With an `OverlappingStage` the next step is decided and started while the device works on this one, on the assumption that
every sequence goes on (vLLM's "async scheduling"). It is for requests whose next row needs no token that is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.graph.backend import Stage
from pyinfer.graph.sampling import OverlappingStage, RowLogprobs, RowSampling, Sampled, SamplingStage
from pyinfer.runtime.batch_builder import Step
from pyinfer.runtime.outputs import Logprob, TokenLogprobs
from pyinfer.runtime.plan import Plan
from pyinfer.runtime.request import Request

NewToken = tuple[int, TokenLogprobs | None]  # a sampled token, or NOT_FINITE, and what was asked about it


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that the device works on."""

    plan: Plan
    step: Step
    ticket: int
    started: float  # when, by the engine's clock


class DeviceSampling:
    def __init__(self, stage: SamplingStage, max_sequences: int) -> None:
        self._stage = stage
        self._most_edits = stage.max_edits // max_sequences  # of a row in any step
        self._overlapping = stage if isinstance(stage, OverlappingStage) and stage.can_overlap else None

    @staticmethod
    def of(stage: Stage, max_sequences: int) -> DeviceSampling | None:
        """None for a stage that cannot."""
        return DeviceSampling(stage, max_sequences) if isinstance(stage, SamplingStage) and stage.can_sample else None

    def run(self, step: Step, n_ahead: int) -> list[list[NewToken]] | None:
        """Run a step and up to `n_ahead` more that repeat it: the tokens of each, in the order of `step.sampled`.

        None, and nothing was run, if some row has to come back whole.
        """
        rows = self._rows(step)
        if rows is None:
            return None
        n_steps = 1 + min(n_ahead, self._stage.max_steps - 1)
        if n_steps > 1 and self._can_run_ahead(step, rows):
            tokens: list[list[int]] = self._stage.run_steps(step.batch, rows, n_steps).tolist()
            return [[(token, None) for token in each] for each in tokens]
        return [_new_tokens(self._stage.run_sampled(step.batch, rows, None))]

    @property
    def can_overlap(self) -> bool:
        return self._overlapping is not None

    def needs_its_tokens(self, request: Request) -> bool:
        """Whether a request's next row can only be asked for when its last token is known, or comes back whole."""
        sequence = request.sequences[0]
        sampler = sequence.sampler
        if len(request.sequences) > 1 or sequence.n_score_rows or sampler is None or sampler.has_history:
            return True
        row = sampler.on_device(0, sequence.tokens)
        if row is None or (row.n_logprobs or 0) > self._stage.max_logprobs:
            return True
        return row.edits is not None and len(row.edits) > self._most_edits

    def start(self, step: Step) -> int:
        """Start a step of requests that do not need their tokens; a ticket for `fetch`."""
        assert self._overlapping is not None
        rows = self._rows(step) if step.sampled else []
        assert rows is not None
        return self._overlapping.start_sampled(step.batch, rows)

    def fetch(self, ticket: int) -> list[NewToken]:
        """Wait for a step's tokens, in the order of `step.sampled`."""
        assert self._overlapping is not None
        return _new_tokens(self._overlapping.fetch_sampled(ticket))

    def _rows(self, step: Step) -> list[RowSampling] | None:
        if not step.sampled or step.scored or step.searched:
            return None
        rows = []
        n_edits = 0
        for sequence, number in zip(step.sampled, step.sampled_rows, strict=True):
            if sequence.n_output == 0 and len(sequence.request.sequences) > 1:
                return None  # its other samples want the same row
            assert sequence.sampler is not None
            row = sequence.sampler.on_device(number, sequence.tokens, sequence.n_coming)
            if row is None or (row.n_logprobs or 0) > self._stage.max_logprobs:
                return None
            n_edits += 0 if row.edits is None else len(row.edits)
            rows.append(row)
        return rows if n_edits <= self._stage.max_edits else None

    @staticmethod
    def _can_run_ahead(step: Step, rows: list[RowSampling]) -> bool:
        """Nothing that a token to come would change."""
        return all(
            row.n_logprobs is None and sequence.sampler is not None and not sequence.sampler.has_history
            for sequence, row in zip(step.sampled, rows, strict=True)
        )


def _new_tokens(sampled: Sampled) -> list[NewToken]:
    pairs = zip(sampled.tokens, sampled.logprobs, strict=True)
    return [(token, None if found is None else to_logprobs(token, found)) for token, found in pairs]


def to_logprobs(token: int, found: RowLogprobs) -> TokenLogprobs:
    """As `logprobs.token_logprobs` has it: the chosen token's entry, then the most likely ones'."""
    result = {token: Logprob(found.logit - found.log_sum, found.rank)}
    for i, (other, logit) in enumerate(zip(found.top_ids, found.top_logits, strict=True)):
        if other != token:
            result[other] = Logprob(logit - found.log_sum, i + 1)
    return result
