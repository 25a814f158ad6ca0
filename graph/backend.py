"""What a backend offers: open a stage from a graph, run batches through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pyinfer.graph.batch import Batch
from pyinfer.graph.graph import Graph

KVDType = Literal["f16", "f32"]
# called with what is being done ("compiling kernels", "loading weights") and the share done, 0..1
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class StageConfig:
    """Sizes fixed for a stage's life."""

    n_pages: int
    block_size: int = 16  # tokens per page: a multiple of 16 on the CPU
    kv_dtype: KVDType = "f16"
    max_tokens: int = 512  # per step, over all sequences
    max_sequences: int = 256
    n_ctx: int = 4096  # longest sequence
    n_threads: int = 1


class Stage(Protocol):
    """A graph's layers on one device, with their weights, buffers and KV pages."""

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Run one step; logits float32 [n_outputs, n_vocab], valid until the next call."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy the K and V of one page over another, in every layer."""
        ...

    def close(self) -> None:
        """Stop the threads and give the memory back."""
        ...


class Backend(Protocol):
    """A kind of device."""

    name: str

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> Stage: ...
