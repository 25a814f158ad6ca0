"""`OpOffloadStage`: a model with blocks on the CPU, whose products a GPU computes in steps of many rows.

The CPU reads every weight once a step, so a step of few rows costs it no more than one; of many rows its arithmetic is what takes
time, and bringing the weights to a GPU costs less. Keys and values, and attention, stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import PageData
from pyinfer.graph.batch import Batch
from pyinfer.graph.ops import F32Array
from pyinfer.graph.sampling import Int32, RowSampling, Sampled
from pyinfer.runtime.stage_chain import StageChain


class OpOffloadStage:
    """See `graph.sampling.SamplingStage`."""

    def __init__(self, usual: StageChain, many_rows: StageChain, min_rows: int, max_outputs: int) -> None:
        """Two chains over the same pages, with the same last stage; `many_rows` runs steps of at least `min_rows` tokens and at
        most `max_outputs` outputs: more go through the head in turns, and with rows that the GPU has kept they cannot."""
        self.usual, self.many_rows, self.min_rows, self.max_outputs = usual, many_rows, min_rows, max_outputs
        self.max_edits, self.max_logprobs = usual.max_edits, usual.max_logprobs
        self.max_steps = usual.max_steps

    def _chain(self, batch: Batch) -> StageChain:
        is_large = batch.n_tokens >= self.min_rows and len(batch.output_rows) <= self.max_outputs
        return self.many_rows if is_large else self.usual

    def run(self, batch: Batch) -> F32Array:
        return self._chain(batch).run(batch)

    @property
    def can_sample(self) -> bool:
        return self.usual.can_sample

    def run_sampled(self, batch: Batch, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None) -> Sampled:
        return self._chain(batch).run_sampled(batch, rows, mask)

    def run_steps(self, batch: Batch, rows: Sequence[RowSampling], n_steps: int) -> Int32:
        return self._chain(batch).run_steps(batch, rows, n_steps)

    def copy_page(self, source: int, target: int) -> None:
        self.usual.copy_page(source, target)

    def read_pages(self, pages: Sequence[int]) -> PageData:
        return self.usual.read_pages(pages)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        self.usual.write_pages(pages, data)

    def close(self) -> None:
        for stage in dict.fromkeys([*self.usual.stages, *self.many_rows.stages]):
            stage.close()
