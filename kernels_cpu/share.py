"""`StageShare`: what CPU stages that run one after another have in common, so that a model in many parts takes what one does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import Progress, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.held_results import HeldResults
from pyinfer.kernels_cpu.attention import scratch_bytes
from pyinfer.kernels_cpu.compiler import compiler_for
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.pages import KVPages
from pyinfer.kernels_cpu.pool import Pool
from pyinfer.kernels_cpu.rope_tables import RopeTables
from pyinfer.kernels_cpu.step_arrays import StepArrays

Memory = npt.NDArray[np.uint8]


class StageShare:
    """Threads, pages, memory of activations, the step's arrays. Stages are lowered in the order in which they run."""

    def __init__(self, config: StageConfig, graph: Graph, progress: Progress | None = None) -> None:
        """`graph` is one of the parts, which all have the same KV layers."""
        self.isa = current_isa()
        self.compiler = compiler_for(self.isa)
        self.compiler.on_compile = (lambda name: progress(f"compiling kernel {name}", 0.0)) if progress else None
        self.ropes = RopeTables(config.n_ctx)
        self.step = StepArrays(config, len(graph.kv_groups))
        self.pages = KVPages(graph, config)
        self.free: list[Memory] = []  # of activations that nothing needs where the next stage is lowered
        self._n_threads = config.n_threads
        self._pool: Pool | None = None
        self.results = HeldResults[Memory]()
        self.n_users = 0

    @property
    def pool(self) -> Pool:
        assert self._pool is not None, "the threads have not been started"
        return self._pool

    def start(self, graphs: Sequence[Graph], max_ops: int) -> None:
        """The threads, for programs of up to `max_ops` records."""
        heads = [layer.head_dim for graph in graphs for layer in graph.kv_layers]
        scratch = max(map(scratch_bytes, heads), default=64)
        self._pool = Pool(self._n_threads, scratch, self.isa, max_ops)

    def leave(self) -> None:
        """One stage less; the last one ends the threads."""
        self.n_users -= 1
        if self.n_users == 0 and self._pool is not None:
            self._pool.close()
