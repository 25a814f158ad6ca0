"""What a backend offers: open a stage from a graph, run batches through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ConfigError
from pyinfer.graph.batch import Batch, Rows
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Value

PageData = npt.NDArray[np.uint8]
# bits of one key or value; q8_0 has a float16 scale for each 32
KV_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
# called with what is being done ("compiling kernels", "loading weights") and the share done, 0..1
Progress = Callable[[str, float], None]


def split_kv_dtype(text: str) -> tuple[str, str]:
    """The types of keys and of values: "f16" names both, "q8_0,f16" each. ConfigError for an unknown one."""
    k, _, v = text.partition(",")
    for name in (k, v or k):
        if name not in KV_BITS:
            known = ", ".join(KV_BITS)
            raise ConfigError(
                f"kv_cache_dtype is {text!r}; give one of {known}, or two of them for keys and values, as q8_0,f16",
                param="kv_cache_dtype",
            )
    return k, v or k


def kv_page_bytes(graph: Graph, block_size: int, kv_dtype: str) -> int:
    """Bytes of one page: keys and values of the layers of one group, for which all groups' pages have room."""
    bits = sum(KV_BITS[name] for name in split_kv_dtype(kv_dtype))
    return round(sum(layer.n_kv_heads * layer.head_dim for layer in graph.page_layers) * block_size * bits / 8)


@dataclass(frozen=True, slots=True)
class StageConfig:
    """Sizes fixed for a stage's life."""

    n_pages: int  # that all KV groups share; a page holds the layers of one group
    block_size: int = 16  # tokens per page: 1 to 64; 16, 32 or 64 on the CPU
    kv_dtype: str = "f16"  # see split_kv_dtype
    max_tokens: int = 512  # per step, over all sequences
    max_sequences: int = 256
    n_ctx: int = 4096  # longest sequence
    n_threads: int = 1
    gpu_expand: bool = False  # keep float16 copies of packed matrices on a GPU
    repack_cache: int = 0  # bytes that repacked weights may take on disk; 0 keeps none
    weights_id: str = ""  # what the weights are read from: files, sizes and times

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence: the width of a page table."""
        return -(-self.n_ctx // self.block_size)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU that can be used."""

    index: int  # as CUDA counts them, after CUDA_VISIBLE_DEVICES
    name: str
    arch: int  # compute capability times ten
    free: int  # bytes, now
    total: int


class Stage(Protocol):
    """A graph's layers on one device, with their weights, buffers and KV pages."""

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Run one step; logits float32 [n_outputs, n_vocab], valid until the next call. Of a part: its first result."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy the K and V of one page over another, of the same group."""
        ...

    def read_pages(self, pages: Sequence[int]) -> PageData:
        """The K and V of these pages, of any groups, in host memory: uint8 [n, bytes of a page]."""
        ...

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        """Put back what `read_pages` gave, into these pages or others of the same groups."""
        ...

    def close(self) -> None:
        """Stop the threads and give the memory back."""
        ...


@runtime_checkable
class PartStage(Stage, Protocol):
    """A stage that can run any part of a graph."""

    def run_part(self, batch: Batch) -> tuple[Rows, ...]:
        """Run one step; the rows of `Graph.results`, each [n or n_outputs, width].

        They are valid until the last stage that reads them has run, or the next call.
        """
        ...


@runtime_checkable
class HostStage(PartStage, Protocol):
    """A part whose results lie in host memory that does not move."""

    @property
    def result_memory(self) -> Sequence[npt.NDArray[np.uint8]]: ...


@runtime_checkable
class PinningStage(PartStage, Protocol):
    """A part on a device that reads host memory faster where that is pinned."""

    def pin(self, memory: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Have this pinned for as long as the stage is open, where that can be; rows come from it."""
        ...


@runtime_checkable
class FeedingStage(PartStage, Protocol):
    """A part on a device that can write into the memory of another part's."""

    def can_feed(self, follower: Stage, batch: Batch) -> bool:
        """Whether `run_into` would do. `follower` reads all results of this part and of no other, in order."""
        ...

    def run_into(self, batch: Batch, follower: Stage) -> None:
        """Start a step. Its results go to where the next run of `follower` reads them, whose batch has no `hidden` then."""
        ...


class Backend(Protocol):
    """A kind of device."""

    name: str

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> Stage: ...


@dataclass(frozen=True, slots=True, eq=False)
class Borrowed:
    """Parts that a device computes in some steps only: for another one, with matrices that stay in host memory, or what it
    computes in all others too, between those."""

    graphs: tuple[Graph, ...]  # in order of execution
    last_readers: tuple[int, ...]  # as for `PartsBackend`, among them
    kept: tuple[tuple[Value, ...], ...]  # results of each that only parts on this device read, borrowed ones or others


@runtime_checkable
class PartsBackend(Backend, Protocol):
    """A backend whose stages can share memory and threads."""

    def open_stages(
        self,
        graphs: Sequence[Graph],
        config: StageConfig,
        progress: Progress | None = None,
        last_readers: Sequence[int] = (),
    ) -> list[PartStage]:
        """Stages that run one after another in every step, in this order, maybe with others between.

        They share pages, so their graphs have the same KV layers; the first moves the pages for all.
        `last_readers[i]`: which of these stages has begun last when the results of stage i are last read; without them all
        results stay until the stage's next run.
        """
        ...


@runtime_checkable
class LendingBackend(PartsBackend, Protocol):
    """A backend whose device can compute for another one."""

    def open_lending_stages(
        self,
        graphs: Sequence[Graph],
        borrowed: Borrowed,
        config: StageConfig,
        progress: Progress | None = None,
        last_readers: Sequence[int] = (),
    ) -> list[PartStage]:
        """As `open_stages`, and behind them the borrowed parts'. Rows of a kept result stay where they are read: a stage
        gives an empty array for them, and takes one."""
        ...
