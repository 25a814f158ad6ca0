"""NVIDIA GPUs as a backend."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pyinfer.errors import BackendError
from pyinfer.graph.backend import Borrowed, PartStage, Progress, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.requirements import usable_gpus
from pyinfer.kernels_gpu.share import DeviceShare
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.kernels_gpu.toolkit import driver_major, install
from pyinfer.kernels_gpu.weight_stream import WeightStream


class GPUBackend:
    """CUDA kernels compiled by NVRTC, run through CuPy on one GPU."""

    name = "gpu"

    def __init__(self, index: int = 0, communicator: Any = None) -> None:
        """`index` as CUDA counts the visible GPUs; `communicator` as for `CuPyDevice`."""
        self._index, self._communicator = index, communicator

    def open_stage(self, graph: Graph, config: StageConfig, progress: Progress | None = None) -> GPUStage:
        stage = GPUStage(self._open_device(progress), graph, config, progress, measure=True)
        try:
            stage.prepare()
        except BaseException:
            stage.close()
            raise
        return stage

    def open_stages(
        self,
        graphs: Sequence[Graph],
        config: StageConfig,
        progress: Progress | None = None,
        last_readers: Sequence[int] = (),
    ) -> list[PartStage]:
        """See `graph.backend.PartsBackend`."""
        return list(stages_on(self._open_device(progress), graphs, config, progress, last_readers, measure=True))

    def open_lending_stages(
        self,
        graphs: Sequence[Graph],
        borrowed: Borrowed,
        config: StageConfig,
        progress: Progress | None = None,
        last_readers: Sequence[int] = (),
    ) -> list[PartStage]:
        """See `graph.backend.LendingBackend`."""
        device = self._open_device(progress)
        return list(stages_on(device, graphs, config, progress, last_readers, borrowed, measure=True))

    def _open_device(self, progress: Progress | None) -> Any:
        device = _cupy_device().CuPyDevice(self._index, self._communicator)
        if progress is not None:
            device.cache.on_compile = lambda name, share: progress(f"compiling kernel {name}", share)
        return device


def stages_on(
    device: Device,
    graphs: Sequence[Graph],
    config: StageConfig,
    progress: Progress | None = None,
    last_readers: Sequence[int] = (),
    borrowed: Borrowed | None = None,
    *,
    measure: bool = False,
) -> list[GPUStage]:
    """Stages that share this device, those of `borrowed` last; see `graph.backend.LendingBackend`."""
    lasts = last_readers or [len(graphs)] * len(graphs)
    stages: list[GPUStage] = []
    try:
        share = DeviceShare(device, graphs, config)
    except BaseException:
        device.close()
        raise
    try:
        share.weights.load(progress)
        for number, (graph, last) in enumerate(zip(graphs, lasts, strict=True)):
            stages.append(
                GPUStage(device, graph, config, share=share, number=number, last_reader=last, measure=measure)
            )
        stages += _borrowed_stages(device, share, borrowed, config, graphs) if borrowed else []
        device.prepare(list(dict.fromkeys(kernel for stage in stages for kernel in stage.kernels())))
    except BaseException:
        share.close()
        raise
    return stages


def _borrowed_stages(
    device: Device, share: DeviceShare, borrowed: Borrowed, config: StageConfig, own: Sequence[Graph]
) -> list[GPUStage]:
    """Their numbers are behind those of the others, as nothing of these is needed when they run."""
    first, is_again = len(own), [any(graph is each for each in own) for graph in borrowed.graphs]
    stream = WeightStream(
        device, [g for g, flag in zip(borrowed.graphs, is_again, strict=True) if not flag], share.weights
    )
    share.on_close(stream.close)
    numbers = itertools.count()
    lent = zip(borrowed.graphs, borrowed.last_readers, borrowed.kept, is_again, strict=True)
    return [
        GPUStage(
            device,
            graph,
            config,
            share=share,
            number=first + i,
            last_reader=first + last,
            stream=None if flag else stream.part(next(numbers)),
            kept=kept,
            is_again=flag,
        )
        for i, (graph, last, kept, flag) in enumerate(lent)
    ]


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
        raise BackendError(
            f"CuPy cannot be imported ({reason}); {install(driver_major())}", param="n_gpu_layers"
        ) from error
