"""`PTXDevice`: `EmulatedDevice` with the PTX of the kernels in place of their C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda_emulator import device as base
from cuda_emulator.build import EmulatorError, runtime
from cuda_emulator.device import EmulatedDevice, check_limits
from ptx_emulator.build import PTXKernel, compile_all, compiled, place_of
from pyinfer.kernels_gpu.cuda_launch import as_word, kind_of
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch

_BUFFERS: dict[int, int] = {}  # address -> bytes, of all devices: one may read another's


class PTXDevice(EmulatedDevice):
    """Compiles for its `arch`: the PTX of compute_75, 80 or 90. With `trace` every access is told to `trace.cpp`."""

    def __init__(self, *, trace: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.name, self.trace = "PTX", trace

    def alloc(self, n_bytes: int) -> Buffer:
        buffer = super().alloc(n_bytes)
        _BUFFERS[buffer.ptr] = n_bytes
        return buffer

    def close(self) -> None:
        for address in self._buffers:
            _BUFFERS.pop(address, None)
        super().close()

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        with base._EMULATOR:
            compile_all(list(dict.fromkeys(kernels)), self.arch, self.trace)

    def _run(self, launch: Launch) -> None:
        kernel = compiled(launch.kernel, self.arch, self.trace)
        n_threads = launch.block[0] * launch.block[1] * launch.block[2]
        problem = _problem(launch, kernel, n_threads, self.shared_bytes)
        if problem is None:
            words = [as_word(arg) for arg in launch.args]
            pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
            grid, block = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.block)
            ranges = np.array(sorted((at, at + n) for at, n in _BUFFERS.items()), np.uint64).reshape(-1, 2)
            kernel.begin(ranges.ctypes.data, len(ranges), launch.shared_bytes, ctypes.addressof(grid), n_threads)
            text = runtime().emulator_launch(
                kernel.call, kernel.poison, ctypes.cast(pointers, ctypes.c_void_p), ctypes.cast(grid, ctypes.c_void_p),
                ctypes.cast(block, ctypes.c_void_p), launch.shared_bytes, int(self.descending),
            )  # fmt: skip
            kernel.finish()
            if text:
                problem = f"{text.decode()}; {place_of(launch.kernel, self.arch, kernel.site())}"
        if problem:
            raise EmulatorError(
                f"{launch.kernel} <<<{launch.grid}, {launch.block}, {launch.shared_bytes}>>>: {problem}"
            )


def _problem(launch: Launch, kernel: PTXKernel, n_threads: int, shared_bytes: int) -> str | None:
    """What a GPU would refuse, and arguments that are not what the function takes."""
    sizes = {"p": "q", "l": "q"}
    kinds = "".join(sizes.get(kind_of(arg), kind_of(arg)) for arg in launch.args)
    if kinds != kernel.signature:
        return f"arguments are {kinds}, the function takes {kernel.signature} (q 64 bits, i 32 bits, f float)"
    if n_threads > kernel.max_threads:
        return f"{n_threads} threads, and __launch_bounds__ says {kernel.max_threads}"
    named = "".join(kind_of(arg) for arg in launch.args)
    return check_limits(launch, _Limits(named, kernel.static_shared), shared_bytes)  # type: ignore[arg-type]


class _Limits:
    """What `check_limits` asks of a kernel."""

    def __init__(self, signature: str, static_shared: int) -> None:
        self.signature, self.static_shared = signature, static_shared


def install() -> None:
    """Before the tests are collected: they find this device where the emulator's was."""
    base.EmulatedDevice = PTXDevice  # type: ignore[misc]
