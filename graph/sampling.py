"""What a stage needs to know to turn logits into tokens where they are, so that only ids and asked logprobs travel back.

A stage that can is a `SamplingStage`. It draws what `runtime.sampler` draws from the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import Stage
from pyinfer.graph.batch import Batch

Int32 = npt.NDArray[np.int32]
# a change of one logit v, all in float32: v + bias (-inf forbids the token), then v / repetition if that is positive,
# else v * repetition, then v - penalty
EDIT = np.dtype([("token", "<i4"), ("bias", "<f4"), ("repetition", "<f4"), ("penalty", "<f4")])
NOT_FINITE = -1  # instead of a token: the logits are NaN or infinite
PREVIOUS = -2  # among `token_ids` of `start_sampled`: PREVIOUS - i is token i of the step that was started before


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How one row of logits becomes a token: edits, min_p, top_k, top_p, then the draw."""

    row: int  # of the logits; rows with edits differ
    temperature: float = 0.0  # 0: the largest logit, of equal ones the lowest id
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    number: float = 0.0  # in [0, 1): what decides the draw
    # (seed, sample index, position of the token to be drawn), of which `number` is BLAKE2b: for steps on the device
    counter: tuple[int, int, int] = (0, 0, 0)
    edits: npt.NDArray[Any] | None = None  # EDIT [n], each token once
    n_logprobs: int | None = None  # the chosen token's and so many most likely ones'


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Of raw logits: a token's logprob is its logit less `log_sum`."""

    logit: float  # of the chosen token
    rank: int  # 1: none is larger
    log_sum: float
    top_ids: list[int]  # by falling logit, ties by rising id
    top_logits: list[float]


@dataclass(frozen=True, slots=True)
class Sampled:
    tokens: list[int]  # one a row, or `NOT_FINITE`
    logprobs: list[RowLogprobs | None]


@runtime_checkable
class SamplingStage(Stage, Protocol):
    """A stage that holds the head and samples where its logits are."""

    can_sample: bool  # False for a part without the head
    max_edits: int  # of all rows of a step
    max_logprobs: int  # for one row
    max_steps: int  # of one `run_steps`; 1: it cannot

    def run_sampled(self, batch: Batch, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None) -> Sampled:
        """Run one step and sample. `mask` [n, ceil(n_vocab / 32)] has a bit for each token that may be drawn."""
        ...

    def run_steps(self, batch: Batch, rows: Sequence[RowSampling], n_steps: int) -> Int32:
        """Decode so many tokens of each sequence without coming back: int32 [n_steps, n_sequences].

        `batch` is the first step, with one token a sequence and pages for all steps; `rows` are in its order, their edits
        hold for all steps.
        """
        ...


@runtime_checkable
class OverlappingStage(SamplingStage, Protocol):
    """A stage that takes the next step before the tokens of this one are known, so that its device need not wait for the host."""

    can_overlap: bool  # False for a part of a model

    def start_sampled(self, batch: Batch, rows: Sequence[RowSampling]) -> int:
        """Start a step, behind those that were started before; `rows` may be none. Returns a ticket.

        `batch.token_ids` may name tokens of the step before (`PREVIOUS`). At most two tickets are out at a time.
        """
        ...

    def fetch_sampled(self, ticket: int) -> Sampled:
        """Wait for what a step gives."""
        ...
