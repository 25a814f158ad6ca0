"""Graphs of real models' shapes without their weights, lowered on a device that only notes which kernels are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from tiny_models import TinyShape, write_tiny_model

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.passes import optimize
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch, Step
from pyinfer.kernels_gpu.lower import lower
from pyinfer.kernels_gpu.program import ProgramShape
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.tensor import QuantTensor
from pyinfer.runtime.models.registry import build_graph


class RecordingDevice:
    """A device of which no memory is touched: what is lowered for it can be looked at, not run."""

    def __init__(self, arch: int = 90, n_sms: int = 132, shared_bytes: int = 227 << 10) -> None:
        self.name, self.arch, self.n_sms, self.shared_bytes = "recording", arch, n_sms, shared_bytes
        self._end = 1 << 20

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def alloc(self, n_bytes: int) -> Buffer:
        start, self._end = self._end, self._end + -(-n_bytes // 256) * 256
        return Buffer(start, n_bytes)

    def alloc_pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.zeros(n_bytes, np.uint8)

    def upload(self, target: Buffer, source: npt.NDArray[Any], offset: int = 0) -> None: ...

    def download(self, source: Buffer, target: npt.NDArray[Any], offset: int = 0) -> None: ...

    def copy(self, target: Buffer, source: Buffer, n_bytes: int) -> None: ...

    def can_receive(self, other: Device) -> bool:
        return False

    def receive(self, other: Device, target: Buffer, source: Buffer, n_bytes: int) -> None: ...

    def pin(self, arrays: Sequence[Any]) -> bool:
        return True

    def copy_aside(self, slot: int, copies: Sequence[Any]) -> None: ...
    def wait_for_copies(self, slot: int) -> None: ...
    def end_of_slot(self, slot: int) -> None: ...
    def zero(self, target: Buffer) -> None: ...

    def record(self, mark: Any = None) -> Any: ...

    def wait(self, mark: Any) -> None: ...

    def prepare(self, kernels: Sequence[Kernel]) -> None: ...

    def launch(self, step: Step) -> None: ...

    def capture(self, steps: Sequence[Step]) -> Any: ...

    def run(self, executable: Any) -> None: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


def shape_graph(arch: str, codec: str | Callable[[str], str], shape: TinyShape, *, optimized: bool = True) -> Graph:
    """A model of this architecture, as large as one likes: all its matrices are one byte seen again and again."""
    written: dict[str, Any] = {}

    def no_weights(name: str, rows: int, columns: int, *_: Any) -> npt.NDArray[np.uint8]:
        return np.broadcast_to(np.zeros(1, np.uint8), (rows, codec_by_name(name).row_bytes(columns)))

    def no_file(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        written.update(metadata=metadata, tensors=tensors)

    with patch("tiny_models.random_weights", no_weights), patch("tiny_models.write_gguf", no_file):
        write_tiny_model(Path("shape.gguf"), arch, codec, shape=shape)
    tensors = {
        name: QuantTensor(name, codec_by_name(kind), dims, data)
        for name, (kind, dims, data) in written["tensors"].items()
    }
    file: Any = SimpleNamespace(path=Path("shape.gguf"), metadata=written["metadata"], tensors=tensors)
    return optimize(build_graph(file)) if optimized else build_graph(file)


def kernels_of(
    graph: Graph, device: RecordingDevice, shapes: Iterable[ProgramShape], config: StageConfig
) -> dict[Kernel, Launch]:
    """The kernels of these programs, each with a launch of it."""
    memory = StageMemory(device, graph, config)
    found: dict[Kernel, Launch] = {}
    for shape in shapes:
        for step in lower(memory, shape).steps:
            if isinstance(step, Launch):
                found.setdefault(step.kernel, step)
    return found
