"""`CPUStage`: a lowered graph with its weights, buffers, pages and threads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import PageData, Progress, StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import narrow_activations
from pyinfer.kernels_cpu.attention import scratch_bytes
from pyinfer.kernels_cpu.attention_args import PARTITION
from pyinfer.kernels_cpu.attention_merge import MAX_SPLIT_TOKENS
from pyinfer.kernels_cpu.buffers import Buffer
from pyinfer.kernels_cpu.compiler import Compiler, compiler_for, source_hash
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.lower import lower, matrices
from pyinfer.kernels_cpu.memory import address
from pyinfer.kernels_cpu.opcode import STEP_WORDS, StepField
from pyinfer.kernels_cpu.pages import KVPages
from pyinfer.kernels_cpu.pool import Pool, Program
from pyinfer.kernels_cpu.repack_cache import RepackCache
from pyinfer.kernels_cpu.rope_tables import RopeTables
from pyinfer.kernels_cpu.weights import WeightArena

_TILE_TOKENS = 8  # query tokens of one attention task
_BLOCK_SIZES = (16, 32, 64)
Int32 = npt.NDArray[np.int32]


class CPUStage:
    """See `graph.backend.Stage`."""

    def __init__(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> None:
        if config.block_size not in _BLOCK_SIZES:
            raise ConfigError(
                f"block_size is {config.block_size}; the CPU kernels read pages of 16, 32 or 64 tokens",
                param="block_size",
            )
        isa = current_isa()
        compiler = compiler_for(isa)
        compiler.on_compile = (lambda name: progress(f"compiling kernel {name}", 0.0)) if progress else None
        if isa.bfloat:
            graph = narrow_activations(graph)
        self._graph, self._config = graph, config
        self._pages = KVPages(graph, config)
        self._ropes = RopeTables(config.n_ctx)
        self._weights = WeightArena(matrices(graph.ops), isa)
        self._lowered = lower(graph, config, compiler, self._weights, self._pages, self._ropes)
        ops = self._lowered.records
        self._step = np.zeros(STEP_WORDS, np.int64)
        self._program = Program(ops, self._step)
        scratch = max((scratch_bytes(layer.head_dim) for layer in graph.kv_layers), default=64)
        self._pool = Pool(config.n_threads, scratch, isa, len(ops))
        self._repack_cache: RepackCache | None = None
        try:
            self._load_weights(compiler, progress)
        except BaseException:
            self._pool.close()
            raise
        self._make_step_arrays()

    def _load_weights(self, compiler: Compiler, progress: Progress | None) -> None:
        config, weights = self._config, self._weights
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

    def _make_step_arrays(self) -> None:
        n, n_groups, pages = self._config.max_tokens, len(self._graph.kv_groups), self._config.max_blocks
        self._token_ids, self._positions, self._output_rows = (np.zeros(n, np.int32) for _ in range(3))
        self._slots = np.zeros((n_groups, n), np.int32)
        self._page_tables = np.zeros((n_groups, self._config.max_sequences, pages), np.int32)
        self._tiles = np.zeros((n, 4), np.int32)
        step = self._step
        step[StepField.ONE] = 1
        step[StepField.TOKEN_IDS] = address(self._token_ids)
        step[StepField.POSITIONS] = address(self._positions)
        step[StepField.SLOTS] = address(self._slots)
        step[StepField.OUTPUT_ROWS] = address(self._output_rows)
        step[StepField.PAGE_TABLES] = address(self._page_tables)
        step[StepField.PAGE_TABLE_STRIDE] = 4 * pages
        step[StepField.ATTENTION_TILES] = address(self._tiles)

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Float32 [n_outputs, n_vocab], or rows for the next stage; they are overwritten by the next call."""
        n, n_outputs = batch.n_tokens, len(batch.output_rows)
        assert 0 < n <= self._config.max_tokens and batch.n_sequences <= self._config.max_sequences
        self._token_ids[:n], self._positions[:n], self._slots[:, :n] = batch.token_ids, batch.positions, batch.slots
        self._output_rows[:n_outputs] = batch.output_rows
        tables = batch.page_tables
        self._page_tables[:, : tables.shape[1], : tables.shape[2]] = tables
        self._ropes.cover(int(batch.positions.max()))
        self._step[StepField.N_TOKENS], self._step[StepField.N_OUTPUTS] = n, n_outputs
        n_tiles = self._cut_tiles(batch)
        spans = self._spans(batch, n_tiles)
        self._step[StepField.N_SPANS], self._step[StepField.N_ATTENTION] = spans, n_tiles * spans
        self._step[StepField.N_MERGED] = n if spans > 1 else 0
        if self._lowered.hidden is not None:
            assert batch.hidden is not None
            self._rows(self._lowered.hidden)[: len(batch.hidden), : batch.hidden.shape[1]] = batch.hidden
        self._pool.run(self._program)
        result = self._graph.logits
        return self._rows(self._lowered.logits)[: n if result.rows == "tokens" else n_outputs, : result.width]

    def _rows(self, buffer: Buffer) -> npt.NDArray[np.float32]:
        return buffer.memory.view(np.float32).reshape(self._config.max_tokens, -1)

    def _cut_tiles(self, batch: Batch) -> int:
        """Fill the attention tiles: (sequence, first token, tokens); returns how many."""
        starts = batch.sequence_starts
        if len(starts) == batch.n_tokens + 1:  # decode: every sequence has one token
            tiles = self._tiles[: batch.n_tokens]
            tiles[:, 0] = tiles[:, 1] = np.arange(batch.n_tokens)
            tiles[:, 2] = 1
            return batch.n_tokens
        count = 0
        for sequence in range(batch.n_sequences):
            start, end = int(starts[sequence]), int(starts[sequence + 1])
            for token in range(start, end, _TILE_TOKENS):
                self._tiles[count, :3] = sequence, token, min(_TILE_TOKENS, end - token)
                count += 1
        return count

    def _spans(self, batch: Batch, n_tiles: int) -> int:
        """Parts to cut each sequence's positions into, so that every thread has attention to do."""
        partitions = int(batch.positions.max()) // PARTITION + 1
        if batch.n_tokens > MAX_SPLIT_TOKENS or self._config.n_threads == 1 or partitions == 1:
            return 1
        heads = min((layer.n_kv_heads for layer in self._graph.kv_layers), default=1)
        return max(1, min(partitions, 2 * self._config.n_threads // (n_tiles * heads)))

    def copy_page(self, source: int, target: int) -> None:
        self._pages.copy(source, target)

    def read_pages(self, pages: Sequence[int]) -> PageData:
        return self._pages.read(pages)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        self._pages.write(pages, data)

    def close(self) -> None:
        """Stop the threads; the memory goes with the object."""
        if self._repack_cache is not None:
            self._repack_cache.close()
        self._pool.close()
