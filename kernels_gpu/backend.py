"""NVIDIA GPUs as a backend."""

from __future__ import annotations

from pyinfer.errors import BackendError
from pyinfer.graph.backend import Progress, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.kernels_gpu.requirements import INSTALL, usable_gpus
from pyinfer.kernels_gpu.stage import GPUStage


class GPUBackend:
    """CUDA kernels compiled by NVRTC, run through CuPy on one GPU."""

    name = "gpu"

    def __init__(self, index: int = 0) -> None:
        """`index` as CUDA counts the visible GPUs."""
        self._index = index

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> GPUStage:
        try:
            from pyinfer.kernels_gpu.cupy_device import CuPyDevice
        except ImportError as error:
            usable_gpus()  # what is missing, if that is all
            reason = str(error).strip().partition("\n")[0]
            raise BackendError(f"CuPy cannot be imported ({reason}); {INSTALL}", param="n_gpu_layers") from error
        device = CuPyDevice(self._index)
        if progress is not None:
            device.cache.on_compile = lambda name: progress(f"compiling kernel {name}", 0.0)
        return GPUStage(device, graph, config, progress, measure=True)
