"""What is planned for a GPU covers what its stage then takes, and not by much: counted on a device without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import TinyShape

from pyinfer.graph.backend import DeviceInfo, StageConfig
from pyinfer.graph.passes import optimize
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Step
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.offload import Offload, make_plan

pytestmark = pytest.mark.unit
FIXED = 512 << 20  # of a plan: what does not grow with the model
CARD = DeviceInfo(0, "card", 90, 1 << 40, 1 << 40)
SHAPE = TinyShape(n_layers=3, n_embd=1024, n_ff=4096, n_heads=16, n_kv_heads=8, head_dim=64, n_ctx=4096)


class CountingDevice:
    """Gives out addresses and does nothing else."""

    name, arch, n_sms, shared_bytes = "counting", 90, 132, 227 << 10

    def __init__(self) -> None:
        self.used = 0

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def alloc(self, n_bytes: int) -> Buffer:
        self.used += -(-n_bytes // 256) * 256
        return Buffer((1 << 40) + self.used - n_bytes, n_bytes)

    def alloc_pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.zeros(n_bytes, np.uint8)

    def upload(self, target: Buffer, source: npt.NDArray[Any], offset: int = 0) -> None: ...
    def download(self, source: Buffer, target: npt.NDArray[Any], offset: int = 0) -> None:
        target[:] = 0  # not what the memory held before

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


@pytest.mark.parametrize("codec", ["Q4_K", "Q8_0", "F16", "Q3_K"])
@pytest.mark.parametrize("max_tokens", [64, 512, 2048])
@pytest.mark.parametrize("offload", [Offload(3, True, True), Offload(2, True), Offload(1)])
def test_the_plan_covers_what_is_taken(
    codec: str, max_tokens: int, offload: Offload, tiny_model: Callable[..., Path]
) -> None:
    graph = optimize(build_graph(GGUFFile.open(tiny_model("llama", codec, shape=SHAPE))))
    config = StageConfig(n_pages=300, n_ctx=4096, max_tokens=max_tokens, max_sequences=64)
    plan = make_plan(graph, config, [CARD], offload, 1.0)
    stage = next(stage for stage in plan.stages if stage.device is not None)
    device = CountingDevice()
    GPUStage(device, stage.graphs[0], config)
    planned = stage.n_bytes(config.n_pages)
    assert device.used < planned - FIXED // 2  # the rest is for what CUDA takes by itself
    assert planned - FIXED < 2 * device.used
