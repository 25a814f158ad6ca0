"""The ranks of a tensor split as threads of one process, and the sum over them: what NCCL does between GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from cuda_emulator.device import EmulatedDevice

from pyinfer.graph.backend import Progress, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.kernels_gpu.stage import GPUStage

F32 = npt.NDArray[np.float32]


class RankSum:
    """`of(rank)` is that rank's all-reduce; sums go in the order of ranks, so that all get the same bits."""

    def __init__(self, n: int) -> None:
        self._parts: list[F32] = [np.empty(0, np.float32)] * n
        self._barrier = threading.Barrier(n)
        self.n_calls = 0

    def of(self, rank: int) -> Callable[[F32], F32]:
        def all_reduce(part: F32) -> F32:
            self._parts[rank] = part
            self.n_calls += rank == 0
            self._barrier.wait(60)
            total: F32 = np.sum(self._parts, axis=0, dtype=np.float32)
            self._barrier.wait(60)  # nobody writes its next part before all have read
            return total

        return all_reduce


class EmulatedRank:
    """A backend with one emulated GPU."""

    name = "gpu"

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> GPUStage:
        return GPUStage(self.device, graph, config, progress)
