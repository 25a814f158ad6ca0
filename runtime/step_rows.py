"""What the rows of a step's logits, float32 [n_rows, n_vocab], are for: scores, the next tokens, the samples beside."""

from __future__ import annotations

from pyinfer.graph.ops import F32Array
from pyinfer.runtime.batch_builder import Step
from pyinfer.runtime.device_sampling import NewToken
from pyinfer.runtime.logprobs import token_logprobs
from pyinfer.runtime.request import State
from pyinfer.runtime.sampler import NOT_FINITE, sample
from pyinfer.runtime.scheduler import Scheduler


def score(step: Step, logits: F32Array) -> None:
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


def fork_samples(step: Step, scheduler: Scheduler, now: float) -> None:
    """A prompt was computed: its request's other samples go on from the same pages and the same logits."""
    for sequence, row in list(zip(step.sampled, step.sampled_rows, strict=True)):
        siblings = sequence.request.sequences
        if sequence.n_output > 0 or len(siblings) == 1:
            continue
        for sibling in siblings:
            if sibling.state is State.WAITING and sibling.n_output == 0 and scheduler.fork(sequence, sibling):
                sibling.cached_tokens = sequence.cached_tokens
                sibling.metrics.first_scheduled_time = now
                step.sampled.append(sibling)
                step.sampled_rows.append(row)


def sample_rows(step: Step, logits: F32Array) -> list[NewToken]:
    """The next token of each of `step.sampled`, with its logprobs if they are wanted."""
    samplers = [s.sampler for s in step.sampled if s.sampler is not None]
    assert len(samplers) == len(step.sampled)
    tokens = sample(logits, step.sampled_rows, samplers, [s.tokens for s in step.sampled])
    found: list[NewToken] = []
    for sequence, token, row in zip(step.sampled, tokens, step.sampled_rows, strict=True):
        params = sequence.request.params
        wants = params.needs_logprobs and token != NOT_FINITE
        found.append((token, token_logprobs(logits[row], token, params.logprobs or 0) if wants else None))
    return found
