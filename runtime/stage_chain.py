"""`StageChain`: stages one after another as one stage; each runs some of a graph's blocks on its own device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from pyinfer.graph.backend import PageData, Stage
from pyinfer.graph.batch import Batch
from pyinfer.graph.ops import F32Array


class StageChain:
    """See `graph.backend.Stage`. A page number means the same page in every stage: each holds its own layers' part of it."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self._ends: list[int] = []  # of each stage's bytes in a page's

    def run(self, batch: Batch) -> F32Array:
        """Every stage but the last gives rows float32 [n, n_embd] to the next; the last gives the logits."""
        rows = self.stages[0].run(batch)
        for stage in self.stages[1:]:
            rows = stage.run(replace(batch, hidden=rows))
        return rows

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
