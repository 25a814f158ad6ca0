"""The emulator's tests on a real GPU: a `CuPyDevice` that takes the place of `EmulatedDevice`.

Every buffer is poisoned before use and ends in a guard that is checked at the end. `install` also moves the seeds of NumPy's
generators, so that each run has inputs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.errors import DeviceMemoryError
from pyinfer.kernels_gpu.cupy_device import CuPyDevice
from pyinfer.kernels_gpu.launch import Buffer, Launch, Reduce, Step

F32Array = npt.NDArray[np.float32]
_GUARD, _POISON = 0xA5, 0xFF  # 0xFF in every byte is a NaN
_GUARD_BYTES = 256


class Captured(list[Step]):
    """What was captured, as the emulator has it, and its graph."""

    graph: Any = None


class CheckedDevice(CuPyDevice):
    """With the methods that tests call, and without a choice of architecture: it is the card's.

    With `all_reduce` it plays one of several GPUs, whose sums are made on the host: then nothing is captured.
    """

    def __init__(
        self, *, all_reduce: Callable[[F32Array], F32Array] | None = None, n_bytes: int = 1 << 40, **ignored: Any
    ) -> None:
        super().__init__(0)
        self._limit, self._used = n_bytes, 0
        self.launches: dict[str, int] = {}
        self._all_reduce = all_reduce
        self._guards: list[Buffer] = []

    def memory(self) -> tuple[int, int]:
        """What tests count: how much they asked for, not what the card has."""
        return self._limit - self._used, self._limit

    def alloc(self, n_bytes: int) -> Buffer:
        if self._used + n_bytes > self._limit:
            raise DeviceMemoryError(f"{n_bytes} bytes are asked for and {self._limit - self._used} are allowed")
        self._used += n_bytes
        padded = -(-n_bytes // 16) * 16
        whole = super().alloc(padded + _GUARD_BYTES)
        buffer, guard = Buffer(whole.ptr, n_bytes), Buffer(whole.ptr + padded, _GUARD_BYTES)
        self.upload(guard, np.full(_GUARD_BYTES, _GUARD, np.uint8))
        self._guards.append(guard)
        return buffer

    def launch(self, step: Step) -> None:
        self._count([step])
        if isinstance(step, Reduce):
            assert self._all_reduce is not None
            self.upload(step.data, self._all_reduce(self.values(step.data, np.float32, step.n)))
            self.synchronize()
        else:
            super().launch(step)

    def capture(self, steps: Sequence[Step]) -> Captured:
        captured = Captured(steps)
        if not self._all_reduce:
            captured.graph = super().capture(steps)
        return captured

    def run(self, executable: Captured) -> None:
        if executable.graph is None or "launch" in vars(self):  # a test looks at every step
            for step in executable:
                self.launch(step)
        else:
            self._count(executable)
            super().run(executable.graph)

    def _count(self, steps: Sequence[Step]) -> None:
        for step in steps:
            name = step.kernel.name if isinstance(step, Launch) else type(step).__name__.lower()
            self.launches[name] = self.launches.get(name, 0) + 1

    def close(self) -> None:
        for guard in self._guards:
            assert (self.values(guard, np.uint8) == _GUARD).all(), "a kernel wrote behind a buffer"
        self._guards.clear()
        self._used = 0
        super().close()

    def array(self, values: npt.NDArray[Any]) -> Buffer:
        values = np.ascontiguousarray(values)
        buffer = self.alloc(values.nbytes)
        self.upload(buffer, values)
        return buffer

    def empty(self, *shape: int, dtype: npt.DTypeLike = np.float32) -> Buffer:
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        buffer = self.alloc(n_bytes)
        self.upload(buffer, np.full(n_bytes, _POISON, np.uint8))
        return buffer

    def values(self, buffer: Buffer, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        size = buffer.n_bytes // np.dtype(dtype).itemsize if not shape else int(np.prod(shape))
        out = np.empty(size, dtype)
        self.download(buffer, out)
        self.synchronize()
        return out.reshape(shape or size)


def install(seed: int) -> None:
    """Before the tests are collected: they find this device where the emulator's was, and inputs of this seed."""
    from cuda_emulator import build, device

    device.EmulatedDevice = CheckedDevice  # type: ignore[misc, assignment]
    build.has_compiler = True
    legacy, modern = np.random.RandomState, np.random.default_rng

    class Moved(legacy):  # type: ignore[misc, valid-type]
        def __init__(self, own: int | None = None) -> None:
            super().__init__(None if own is None else own + seed)

    def moved_rng(own: int | None = None) -> np.random.Generator:
        return modern(None if own is None else own + seed)

    vars(np.random).update(RandomState=Moved, default_rng=moved_rng)
