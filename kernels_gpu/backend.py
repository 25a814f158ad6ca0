"""NVIDIA GPUs as a backend."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pyinfer.errors import BackendError
from pyinfer.graph.backend import Progress, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.kernels_gpu.requirements import INSTALL, usable_gpus
from pyinfer.kernels_gpu.stage import GPUStage


class GPUBackend:
    """CUDA kernels compiled by NVRTC, run through CuPy on one GPU."""

    name = "gpu"

    def __init__(self, index: int = 0, communicator: Any = None) -> None:
        """`index` as CUDA counts the visible GPUs; `communicator` as for `CuPyDevice`."""
        self._index, self._communicator = index, communicator

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> GPUStage:
        device = _cupy_device().CuPyDevice(self._index, self._communicator)
        if progress is not None:
            device.cache.on_compile = lambda name, share: progress(f"compiling kernel {name}", share)
        stage = GPUStage(device, graph, config, progress, measure=True)
        try:
            stage.prepare()
        except BaseException:
            stage.close()
            raise
        return stage


def rank_backends(indices: Sequence[int]) -> list[GPUBackend]:
    """One for each of these GPUs, whose stages add up what they have; they are to be opened at the same time."""
    communicators = _cupy_device().rank_communicators(indices)
    return [GPUBackend(index, communicator) for index, communicator in zip(indices, communicators, strict=True)]


def _cupy_device() -> ModuleType:
    try:
        return importlib.import_module("pyinfer.kernels_gpu.cupy_device")
    except ImportError as error:
        usable_gpus()  # what is missing, if that is all
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(f"CuPy cannot be imported ({reason}); {INSTALL}", param="n_gpu_layers") from error
