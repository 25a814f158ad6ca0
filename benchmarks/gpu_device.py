"""The emulator's tests on a real GPU: a `CuPyDevice` that takes the place of `EmulatedDevice`.

Every buffer is poisoned before use and ends in a guard that is checked at the end. `install` also moves the seeds of NumPy's
generators, so that each run has inputs of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.kernels_gpu.cupy_device import CuPyDevice
from pyinfer.kernels_gpu.launch import Buffer, Launch, Step

_GUARD, _POISON = 0xA5, 0xFF  # 0xFF in every byte is a NaN
_GUARD_BYTES = 256


class CheckedDevice(CuPyDevice):
    """With the methods that tests call, and without a choice of architecture: it is the card's."""

    def __init__(self, **ignored: Any) -> None:
        super().__init__(0)
        self.launches: dict[str, int] = {}
        self._guards: list[Buffer] = []

    def alloc(self, n_bytes: int) -> Buffer:
        padded = -(-n_bytes // 16) * 16
        whole = super().alloc(padded + _GUARD_BYTES)
        buffer, guard = Buffer(whole.ptr, n_bytes), Buffer(whole.ptr + padded, _GUARD_BYTES)
        self.upload(guard, np.full(_GUARD_BYTES, _GUARD, np.uint8))
        self._guards.append(guard)
        return buffer

    def launch(self, step: Step) -> None:
        name = step.kernel.name if isinstance(step, Launch) else "gemm"
        self.launches[name] = self.launches.get(name, 0) + 1
        super().launch(step)

    def close(self) -> None:
        for guard in self._guards:
            assert (self.values(guard, np.uint8) == _GUARD).all(), "a kernel wrote behind a buffer"
        self._guards.clear()
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
