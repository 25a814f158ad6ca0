"""`StageChain`: stages one after another as one stage; each runs some of a graph's ops on its own device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import FeedingStage, PageData, PartStage, Stage
from pyinfer.graph.batch import Batch, Rows
from pyinfer.graph.ops import F32Array
from pyinfer.graph.sampling import Int32, RowSampling, Sampled, SamplingStage

Sources = Sequence[Sequence[tuple[int, int]]]


class StageChain:
    """See `graph.backend.Stage`. A page number means the same page in every stage: each holds its own layers' part of it."""

    def __init__(self, stages: Sequence[Stage], sources: Sources | None = None) -> None:
        """`sources` are those of `graph.split`: which results of which stages each one reads. None: all of the one before."""
        self.stages = list(stages)
        self._sources = sources
        # what each can, as to ask takes as long as to run a small one
        self._parts = [stage if isinstance(stage, PartStage) else None for stage in self.stages]
        self._feeding = [
            stage if isinstance(stage, FeedingStage) and self._is_straight(number) else None
            for number, stage in enumerate(self.stages[:-1])
        ]
        self._ends: list[int] = []  # of each stage's bytes in a page's
        last = self.stages[-1]
        self._sampler = last if isinstance(last, SamplingStage) and last.can_sample else None
        self.max_edits = self._sampler.max_edits if self._sampler else 0
        self.max_logprobs = self._sampler.max_logprobs if self._sampler else 0
        self.max_steps = 1

    def run(self, batch: Batch) -> F32Array:
        """Every stage but the last gives rows to those after it; the last gives the logits."""
        return self.stages[-1].run(self._until_last(batch))

    def _until_last(self, batch: Batch) -> Batch:
        """Run all stages but the last; the batch for that."""
        results: list[tuple[Rows, ...]] = []
        is_fed = False
        for number, (stage, part, feeding) in enumerate(zip(self.stages, self._parts, self._feeding, strict=False)):
            own = replace(batch, hidden=()) if is_fed else self._batch_for(number, batch, results)
            follower = self.stages[number + 1]
            is_fed = feeding is not None and feeding.can_feed(follower, batch)
            if is_fed and feeding is not None:
                feeding.run_into(own, follower)
                results.append(())
            else:
                results.append((stage.run(own),) if part is None else part.run_part(own))
        return replace(batch, hidden=()) if is_fed else self._batch_for(len(results), batch, results)

    def _is_straight(self, number: int) -> bool:
        """Whether the stage after this one reads all that it gives, and no other does."""
        if self._sources is None:
            return True
        read = self._sources[number + 1]
        others = (place for later, places in enumerate(self._sources) if later != number + 1 for place in places)
        return all(stage == number for stage, _ in read) and all(stage != number for stage, _ in others)

    def _batch_for(self, number: int, batch: Batch, results: Sequence[tuple[Rows, ...]]) -> Batch:
        if number == 0:
            return batch
        if self._sources is None:
            return replace(batch, hidden=results[-1])
        return replace(batch, hidden=tuple(results[stage][i] for stage, i in self._sources[number]))

    @property
    def can_sample(self) -> bool:
        """See `graph.sampling.SamplingStage`: the head's stage may draw from its logits."""
        return self._sampler is not None

    def run_sampled(self, batch: Batch, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None) -> Sampled:
        assert self._sampler is not None
        return self._sampler.run_sampled(self._until_last(batch), rows, mask)

    def run_steps(self, batch: Batch, rows: Sequence[RowSampling], n_steps: int) -> Int32:
        """One step: its tokens have to come back, to be embedded by the first stage."""
        assert n_steps == self.max_steps
        return np.array([self.run_sampled(batch, rows, None).tokens], np.int32)

    def copy_page(self, source: int, target: int) -> None:
        for stage in self.stages:
            stage.copy_page(source, target)

    def read_pages(self, pages: Sequence[int]) -> PageData:
        parts = [stage.read_pages(pages) for stage in self.stages]
        self._ends = list(accumulate(part.shape[1] for part in parts))
        return np.concatenate(parts, axis=1)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        for stage, start, end in zip(self.stages, [0, *self._ends], self._ends, strict=False):
            stage.write_pages(pages, data[:, start:end])

    def close(self) -> None:
        for stage in self.stages:
            stage.close()
