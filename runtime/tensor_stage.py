"""`TensorStage`: the ranks of a tensor split as one stage. All work on every step at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pyinfer.errors import BackendError
from pyinfer.graph.backend import Backend, PageData, Progress, Stage, StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import F32Array
from pyinfer.graph.sampling import Int32, OverlappingStage, RowSampling, Sampled, SamplingStage

T = TypeVar("T")


def open_tensor_stage(
    ranks: Sequence[Backend], graphs: Sequence[Graph], config: StageConfig, progress: Progress | None = None
) -> TensorStage:
    """Open all ranks at once: what one does while it opens may need the others."""
    with ThreadPoolExecutor(len(ranks), "pyinfer-rank") as threads:
        jobs = [
            threads.submit(rank.open_stage, graph, config, progress if number == 0 else None)
            for number, (rank, graph) in enumerate(zip(ranks, graphs, strict=True))
        ]
    failed = [error for job in jobs if (error := job.exception()) is not None]
    if failed:
        for job in jobs:
            if job.exception() is None:
                job.result().close()
        raise failed[0]
    return TensorStage([job.result() for job in jobs])


class TensorStage:
    """See `graph.backend.Stage` and `graph.sampling.SamplingStage`.

    Each rank holds its heads' part of every page. All have whole logits, the same bits, so each draws the same tokens by itself
    and goes on with them; the first one's are what comes back.
    """

    def __init__(self, ranks: Sequence[Stage]) -> None:
        self.ranks = list(ranks)
        samplers = [rank for rank in ranks if isinstance(rank, SamplingStage) and rank.can_sample]
        self.can_sample = len(samplers) == len(ranks)
        self.max_edits, self.max_logprobs, self.max_steps = (
            min((getattr(sampler, name) for sampler in samplers), default=0)
            for name in ("max_edits", "max_logprobs", "max_steps")
        )
        self._threads = ThreadPoolExecutor(len(ranks), "pyinfer-rank")
        self._ends: list[int] = []  # of each rank's bytes in a page's

    def run(self, batch: Batch) -> F32Array:
        return self._all(lambda rank: rank.run(batch))[0]

    def run_sampled(self, batch: Batch, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None) -> Sampled:
        drawn = self._all(lambda rank: _sampler(rank).run_sampled(batch, rows, mask))
        self._check_equal([sampled.tokens for sampled in drawn])
        return drawn[0]

    def run_steps(self, batch: Batch, rows: Sequence[RowSampling], n_steps: int) -> Int32:
        drawn = self._all(lambda rank: _sampler(rank).run_steps(batch, rows, n_steps))
        self._check_equal([tokens.tolist() for tokens in drawn])
        return drawn[0]

    @property
    def can_overlap(self) -> bool:
        """See `graph.sampling.OverlappingStage`."""
        return all(isinstance(rank, OverlappingStage) and rank.can_overlap for rank in self.ranks)

    def start_sampled(self, batch: Batch, rows: Sequence[RowSampling]) -> int:
        return self._all(lambda rank: _overlapping(rank).start_sampled(batch, rows))[0]  # all count alike

    def fetch_sampled(self, ticket: int) -> Sampled:
        drawn = self._all(lambda rank: _overlapping(rank).fetch_sampled(ticket))
        self._check_equal([sampled.tokens for sampled in drawn])
        return drawn[0]

    @staticmethod
    def _check_equal(tokens: Sequence[object]) -> None:
        if any(other != tokens[0] for other in tokens[1:]):
            raise BackendError(
                "the GPUs of a tensor split drew different tokens from one row of logits; use GPUs of one kind, or a layer split",
                param="gpu_split",
            )

    def copy_page(self, source: int, target: int) -> None:
        self._all(lambda rank: rank.copy_page(source, target))

    def read_pages(self, pages: Sequence[int]) -> PageData:
        parts = self._all(lambda rank: rank.read_pages(pages))
        self._ends = list(accumulate(part.shape[1] for part in parts))
        return np.concatenate(parts, axis=1)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        for rank, start, end in zip(self.ranks, [0, *self._ends], self._ends, strict=False):
            rank.write_pages(pages, np.ascontiguousarray(data[:, start:end]))

    def close(self) -> None:
        self._all(lambda rank: rank.close())
        self._threads.shutdown()

    def _all(self, work: Callable[[Stage], T]) -> list[T]:
        """Each rank's, on a thread of its own: they wait for each other inside."""
        return [job.result() for job in [self._threads.submit(work, rank) for rank in self.ranks]]


def _sampler(rank: Stage) -> SamplingStage:
    assert isinstance(rank, SamplingStage)
    return rank


def _overlapping(rank: Stage) -> OverlappingStage:
    assert isinstance(rank, OverlappingStage)
    return rank
