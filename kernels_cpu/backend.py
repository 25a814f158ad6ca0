"""The CPU as a backend."""

from __future__ import annotations

from pyinfer.graph.backend import Progress, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.kernels_cpu.stage import CPUStage


class CPUBackend:
    """Numba and LLVM kernels on a persistent thread pool."""

    name = "cpu"

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> CPUStage:
        return CPUStage(graph, config, progress)
