"""`PTXDevice`: `EmulatedDevice` with the PTX of the kernels in place of their C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_emulator import device as base
from cuda_emulator.build import EmulatorError, runtime
from cuda_emulator.device import EmulatedDevice, check_limits

from ptx_emulator.build import PTXKernel, compile_all, compiled, place_of
from pyinfer.kernels_gpu.cuda_launch import as_word, kind_of
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch, Step

Marks = npt.NDArray[np.uint8]
_BUFFERS: dict[int, tuple[int, Marks]] = {}  # address -> bytes and marks, of all devices: one may read another's


class PTXDevice(EmulatedDevice):
    """Compiles for its `arch`: the PTX of compute_75, 80 or 90. With `trace` every access is told to `trace.cpp`.

    Launches with `overlap` must not touch what those before them write until they have waited; everything else that the device
    does comes after all launches before it.
    """

    default_arch = 90

    def __init__(self, *, arch: int | None = None, trace: bool = False, **options: Any) -> None:
        super().__init__(arch=arch or self.default_arch, **options)
        self.name, self.trace = "PTX", trace
        self._oldest = self._mark = 1

    def alloc(self, n_bytes: int) -> Buffer:
        buffer = super().alloc(n_bytes)
        _BUFFERS[buffer.ptr] = (n_bytes, np.zeros(n_bytes // 4 + 1, np.uint8))
        return buffer

    def launch(self, step: Step) -> None:
        if not (isinstance(step, Launch) and step.overlap and self.arch >= 90):
            self._all_is_done()
        super().launch(step)

    def run(self, executable: list[Step]) -> None:
        """On a card a graph, which starts when all before it is done."""
        self._all_is_done()
        super().run(executable)

    def upload(self, target: Buffer, source: npt.NDArray[Any], offset: int = 0) -> None:
        self._all_is_done()
        super().upload(target, source, offset)

    def download(self, source: Buffer, target: npt.NDArray[Any], offset: int = 0) -> None:
        self._all_is_done()
        super().download(source, target, offset)

    def copy(self, target: Buffer, source: Buffer, n_bytes: int) -> None:
        self._all_is_done()
        super().copy(target, source, n_bytes)

    def zero(self, target: Buffer) -> None:
        self._all_is_done()
        super().zero(target)

    def _all_is_done(self) -> None:
        """Launches from now on overlap nothing that was."""
        self._oldest = self._mark + 1

    def _next_mark(self) -> None:
        self._mark += 1
        if self._mark > 255:  # what was written is forgotten
            self._oldest = self._mark = 1
            for _, marks in _BUFFERS.values():
                marks[:] = 0

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
            known = sorted((at, at + n, marks.ctypes.data) for at, (n, marks) in _BUFFERS.items())
            ranges, overlaps = np.array(known, np.uint64).reshape(-1, 3), launch.overlap and self.arch >= 90
            self._next_mark()
            kernel.begin(
                ranges.ctypes.data, len(ranges), launch.shared_bytes, ctypes.addressof(grid), n_threads,
                overlaps, self._oldest, self._mark,
            )  # fmt: skip
            text = runtime().emulator_launch(
                kernel.call, kernel.poison, ctypes.cast(pointers, ctypes.c_void_p), ctypes.cast(grid, ctypes.c_void_p),
                ctypes.cast(block, ctypes.c_void_p), launch.shared_bytes, int(self.descending),
            )  # fmt: skip
            kernel.finish()
            if text:
                problem = f"{text.decode()}; {place_of(launch.kernel, self.arch, kernel.site())}"
            elif overlaps and not kernel.has_waited():
                problem = "no thread has waited for the kernels before this one, so those behind it do not either"
            if kernel.opens_late() or not overlaps:  # those before it have ended when the next one starts
                self._oldest = self._mark
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


def install(arch: int) -> None:
    """Before the tests are collected: they find this device where the emulator's was."""
    PTXDevice.default_arch = arch
    base.EmulatedDevice = PTXDevice  # type: ignore[misc]
