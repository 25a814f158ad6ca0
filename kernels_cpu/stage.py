"""`CPUStage`: a lowered graph with its weights, buffers, pages and threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import PageData, Progress, StageConfig
from pyinfer.graph.batch import Batch, Rows
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import narrow_activations
from pyinfer.kernels_cpu.attention_args import PARTITION
from pyinfer.kernels_cpu.attention_merge import MAX_SPLIT_TOKENS
from pyinfer.kernels_cpu.buffers import Buffer
from pyinfer.kernels_cpu.compiler import source_hash
from pyinfer.kernels_cpu.lower import lower, matrices
from pyinfer.kernels_cpu.memory import address
from pyinfer.kernels_cpu.opcode import StepField
from pyinfer.kernels_cpu.pool import Pool, Program
from pyinfer.kernels_cpu.repack_cache import RepackCache
from pyinfer.kernels_cpu.share import StageShare
from pyinfer.kernels_cpu.weights import WeightArena

_BLOCK_SIZES = (16, 32, 64)
_ALIGNMENT = 64  # bytes


class CPUStage:
    """See `graph.backend.PartStage`."""

    def __init__(
        self,
        graph: Graph,
        config: StageConfig,
        progress: Progress | None = None,
        *,
        share: StageShare | None = None,
        number: int = 0,
        last_reader: int = 0,
    ) -> None:
        """Ready to run; with a `share` only lowered, and to be loaded once its threads are started.

        `number` is the stage's among those that share, in the order in which they run, and `last_reader` that of the last
        one that reads its results.
        """
        if config.block_size not in _BLOCK_SIZES:
            raise ConfigError(
                f"block_size is {config.block_size}; the CPU kernels read pages of 16, 32 or 64 tokens",
                param="block_size",
            )
        self._is_alone = share is None
        self._share = share = share or StageShare(config, graph, progress)
        if share.isa.bfloat:
            graph = narrow_activations(graph)
        self.graph, self._config = graph, config
        self._has_pages = number == 0  # for all stages that share them
        self._weights = WeightArena(matrices(graph.ops), share.isa)
        share.free += share.results.release_before(number)
        self._lowered = lower(graph, config, share.compiler, self._weights, share.pages, share.ropes, share.free)
        share.results.hold(last_reader, [result.memory for result in self._lowered.results])
        share.results.hold(number, [hidden.memory for hidden in self._lowered.hidden])
        self._hidden_words = [
            np.flatnonzero(self._lowered.records == hidden.address) for hidden in self._lowered.hidden
        ]
        self._program = Program(self._lowered.records, share.step.header)
        self._repack_cache: RepackCache | None = None
        share.n_users += 1
        if self._is_alone:
            share.start([graph], self.n_records)
            try:
                self.load(progress)
            except BaseException:
                self.close()
                raise

    @property
    def n_records(self) -> int:
        """Of the program: what a pool must have room for."""
        return len(self._lowered.records)

    @property
    def _pool(self) -> Pool:
        return self._share.pool

    @property
    def result_memory(self) -> list[npt.NDArray[np.uint8]]:
        """See `graph.backend.HostStage`."""
        return [result.memory for result in self._lowered.results]

    def load(self, progress: Progress | None = None) -> None:
        """Read and repack the weights."""
        config, weights, compiler = self._config, self._weights, self._share.compiler
        if not weights.n_bytes:
            return
        if not (config.repack_cache and config.weights_id):
            weights.load(self._pool, compiler, progress)
            return
        made_from = f"{config.weights_id}\n{source_hash()} {compiler.isa.bfloat}\n{weights.description}"
        cache = RepackCache(config.repack_cache, made_from)
        if cache.read(weights.memory, config.n_threads):
            weights.release_files()
            return
        weights.load(self._pool, compiler, progress)
        cache.write(weights.memory)
        self._repack_cache = cache

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Float32 [n_outputs, n_vocab], or a part's first result; overwritten by the next call."""
        return self.run_part(batch)[0]

    def run_part(self, batch: Batch) -> tuple[Rows, ...]:
        """See `graph.backend.PartStage`."""
        n, n_outputs = batch.n_tokens, len(batch.output_rows)
        assert 0 < n <= self._config.max_tokens and batch.n_sequences <= self._config.max_sequences
        assert len(batch.hidden) == len(self._lowered.hidden)
        step = self._share.step
        step.load(batch, once=not self._is_alone)
        self._share.ropes.cover(int(batch.positions.max()))
        spans, n_tiles = self._spans(batch, step.n_tiles), step.n_tiles
        step.header[StepField.N_SPANS], step.header[StepField.N_ATTENTION] = spans, n_tiles * spans
        step.header[StepField.N_MERGED] = n if spans > 1 else 0
        for number, rows in enumerate(batch.hidden):
            self._take(number, rows)
        self._pool.run(self._program)
        return tuple(
            self._rows(buffer, np.dtype(np.int32 if value.dtype == "i32" else np.float32))[
                : n if value.rows == "tokens" else n_outputs, : value.width
            ]
            for value, buffer in zip(self.graph.results, self._lowered.results, strict=True)
        )

    def _take(self, number: int, rows: Rows) -> None:
        """Have the kernels read a stage's rows where they are, or a copy where that is not as they need it."""
        buffer = self._lowered.hidden[number]
        is_usable = rows.flags.c_contiguous and rows.strides[0] == buffer.stride and address(rows) % _ALIGNMENT == 0
        if not is_usable:
            self._rows(buffer, rows.dtype)[: len(rows), : rows.shape[1]] = rows
        self._lowered.records.reshape(-1)[self._hidden_words[number]] = address(rows) if is_usable else buffer.address

    def _rows(self, buffer: Buffer, dtype: np.dtype[Any]) -> Rows:
        return buffer.memory.view(dtype).reshape(self._config.max_tokens, -1)

    def _spans(self, batch: Batch, n_tiles: int) -> int:
        """Parts to cut each sequence's positions into, so that every thread has attention to do."""
        partitions = int(batch.positions.max()) // PARTITION + 1
        if batch.n_tokens > MAX_SPLIT_TOKENS or self._config.n_threads == 1 or partitions == 1:
            return 1
        heads = min((layer.n_kv_heads for layer in self.graph.kv_layers), default=1)
        return max(1, min(partitions, 2 * self._config.n_threads // (n_tiles * heads)))

    def copy_page(self, source: int, target: int) -> None:
        if self._has_pages:
            self._share.pages.copy(source, target)

    def read_pages(self, pages: Sequence[int]) -> PageData:
        return self._share.pages.read(pages) if self._has_pages else np.empty((len(pages), 0), np.uint8)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        if self._has_pages:
            self._share.pages.write(pages, data)

    def close(self) -> None:
        """Stop the threads, if no other stage has them; the memory goes with the object."""
        if self._repack_cache is not None:
            self._repack_cache.close()
        self._share.leave()
