"""`CuPyDevice`: a real GPU. The only file that imports CuPy, and only its thin layer over the CUDA runtime.

Everything goes to one non-blocking stream. A device may be used by any thread, one at a time: the CUDA runtime's current
device is a thread's own, so every method sets it (`OnDevice`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt
from cupy.cuda import driver, runtime

from pyinfer.errors import BackendError, DeviceMemoryError
from pyinfer.kernels_gpu.cublas import WORKSPACE_BYTES, CuBLAS
from pyinfer.kernels_gpu.cuda_launch import DYNAMIC_SHARED, Launcher
from pyinfer.kernels_gpu.device import Bytes, Device
from pyinfer.kernels_gpu.kernel_cache import KernelCache, Unit, unit_of
from pyinfer.kernels_gpu.launch import Buffer, Gemm, Kernel, Launch, Reduce, Step
from pyinfer.kernels_gpu.on_device import OUT_OF_MEMORY, OnDevice
from pyinfer.kernels_gpu.pinned_pieces import PinnedPieces
from pyinfer.kernels_gpu.side_copies import SideCopies

_ALIGNMENT = 256
_CHUNK = 32 << 20  # small buffers share chunks of this size; larger ones are allocated by themselves
_ERRORS = (runtime.CUDARuntimeError, driver.CUDADriverError)
_OVERLAP_IN_GRAPHS = 12030  # the first CUDA whose graphs keep programmatic dependent launches
_NCCL_FLOAT32, _NCCL_SUM = 7, 0  # nccl.h


def rank_communicators(indices: Sequence[int]) -> list[Any]:
    """NCCL's, one for each of these GPUs; BackendError says what to install."""
    from cupy.cuda import nccl  # here, as it warns where it is not installed

    if not nccl.available:
        raise BackendError(
            f"CuPy finds no NCCL, which a tensor split over GPUs needs; pip install nvidia-nccl-cu"
            f"{runtime.runtimeGetVersion() // 1000}, or use --gpu-split layer",
            param="gpu_split",
        )
    return list(nccl.NcclCommunicator.initAll(list(indices)))


class CuPyDevice:
    """See `kernels_gpu.device.Device`."""

    def __init__(self, index: int = 0, communicator: Any = None) -> None:
        """`communicator`: this device's of `rank_communicators`, if it is one of several that add up what they have."""
        self.index = index
        self._communicator = communicator
        self._reduced: set[int] = set()  # sizes that were summed over the ranks before
        self._here = OnDevice(runtime, _ERRORS, index)
        with self._here:
            properties = runtime.getDeviceProperties(index)
            self.name: str = properties["name"].decode()
            self._here.name += f" ({self.name})"
            self.arch = 10 * int(properties["major"]) + int(properties["minor"])
            self.n_sms = int(properties["multiProcessorCount"])
            self.shared_bytes = int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index))
            self.cache = KernelCache(self.arch)
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._launcher = Launcher(
                ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"), self._stream.ptr
            )
            self._overlap = self.arch >= 90 and int(runtime.driverGetVersion()) >= _OVERLAP_IN_GRAPHS
        self._blas: CuBLAS | None = None
        self._modules: dict[Unit, int] = {}
        self._functions: dict[Kernel, int] = {}
        self._shared_of: dict[int, int] = {}  # function -> dynamic shared memory that it was allowed
        self._allocated: list[int] = []
        self._chunk, self._chunk_left = 0, 0
        self._pinned: list[tuple[int, int]] = []
        self._peers: dict[int, bool] = {}  # index of another GPU -> whether its memory can be read
        self._order: int | None = None  # an event
        self._aside: SideCopies | None = None
        self._pieces: PinnedPieces | None = None
        self._marks: list[int] = []  # events

    # ---- memory
    def memory(self) -> tuple[int, int]:
        with self._here:
            free, total = runtime.memGetInfo()
            return int(free), int(total)

    def alloc(self, n_bytes: int) -> Buffer:
        with self._here:
            size = -(-max(n_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
            if size > _CHUNK // 2:
                return Buffer(self._malloc(size), n_bytes)
            if size > self._chunk_left:
                self._chunk, self._chunk_left = self._malloc(_CHUNK), _CHUNK
            ptr = self._chunk + _CHUNK - self._chunk_left
            self._chunk_left -= size
            return Buffer(ptr, n_bytes)

    def _malloc(self, n_bytes: int) -> int:
        try:
            ptr = int(runtime.malloc(n_bytes))
        except runtime.CUDARuntimeError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            free, total = runtime.memGetInfo()
            raise DeviceMemoryError(
                f"{self._here.name} has {free >> 20} MiB free of {total >> 20} and {n_bytes >> 20} MiB more "
                f"are needed; use fewer layers (-ngl), a smaller context or --gpu-memory-utilization",
                param="n_gpu_layers",
            ) from error
        self._allocated.append(ptr)
        return ptr

    def alloc_pinned(self, n_bytes: int) -> Bytes:
        with self._here:
            ptr = int(runtime.hostAlloc(max(n_bytes, 1), runtime.hostAllocPortable))
            self._pinned.append((ptr, ptr + n_bytes))
            memory: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(ptr))
            return memory

    def upload(self, target: Buffer, source: npt.NDArray[Any], offset: int = 0) -> None:
        assert source.flags.c_contiguous
        with self._here:
            to = target.at(offset, source.nbytes).ptr
            if self._is_pinned(source):
                runtime.memcpyAsync(to, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, self._stream.ptr)
                return
            if self._pieces is None:
                self._pieces = PinnedPieces(runtime, self._stream.ptr, self.alloc_pinned)
            self._pieces.copy(to, source)

    def download(self, source: Buffer, target: npt.NDArray[Any], offset: int = 0) -> None:
        assert target.flags.c_contiguous and target.flags.writeable
        with self._here:
            start = source.at(offset, target.nbytes).ptr
            runtime.memcpyAsync(target.ctypes.data, start, target.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr)
            if not self._is_pinned(target):
                runtime.streamSynchronize(self._stream.ptr)

    def copy(self, target: Buffer, source: Buffer, n_bytes: int) -> None:
        with self._here:
            to, start = target.at(0, n_bytes).ptr, source.at(0, n_bytes).ptr
            runtime.memcpyAsync(to, start, n_bytes, runtime.memcpyDeviceToDevice, self._stream.ptr)

    def can_receive(self, other: Device) -> bool:
        """Where GPUs cannot read each other's memory, copies would go through the host all the same."""
        if not isinstance(other, CuPyDevice) or other.index == self.index:
            return False
        if other.index not in self._peers:
            with self._here:
                self._peers[other.index] = bool(runtime.deviceCanAccessPeer(self.index, other.index))
                if self._peers[other.index]:
                    try:
                        runtime.deviceEnablePeerAccess(other.index)
                    except runtime.CUDARuntimeError as error:  # by another stage of this process
                        self._peers[other.index] = "AlreadyEnabled" in str(error)
        return self._peers[other.index]

    def receive(self, other: Device, target: Buffer, source: Buffer, n_bytes: int) -> None:
        assert isinstance(other, CuPyDevice)
        to, start = target.at(0, n_bytes).ptr, source.at(0, n_bytes).ptr
        with other._here:
            done = other._event()
            runtime.eventRecord(done, other._stream.ptr)
        with self._here:
            copied = self._event()
            runtime.streamWaitEvent(self._stream.ptr, done)
            runtime.memcpyPeerAsync(to, self.index, start, other.index, n_bytes, self._stream.ptr)
            runtime.eventRecord(copied, self._stream.ptr)
        with other._here:
            runtime.streamWaitEvent(other._stream.ptr, copied)

    def _event(self) -> int:
        """This device's, for orders between streams: a wait is for what was recorded last, so that one does."""
        if self._order is None:
            self._order = int(runtime.eventCreateWithFlags(runtime.eventDisableTiming))
        return self._order

    def pin(self, arrays: Sequence[npt.NDArray[Any]]) -> bool:
        with self._here:
            if self._aside is None:
                self._aside = SideCopies(runtime, self._stream.ptr, self.alloc_pinned)
            return self._aside.pin(arrays)

    def copy_aside(self, slot: int, copies: Sequence[tuple[Buffer, npt.NDArray[Any]]]) -> None:
        with self._here:
            self._side.copy(slot, copies)

    def wait_for_copies(self, slot: int) -> None:
        with self._here:
            self._side.wait(slot)

    def end_of_slot(self, slot: int) -> None:
        with self._here:
            self._side.end(slot)

    @property
    def _side(self) -> SideCopies:
        assert self._aside is not None, "`pin` comes first"
        return self._aside

    def record(self, mark: Any = None) -> Any:
        with self._here:
            if mark is None:
                mark = int(runtime.eventCreateWithFlags(runtime.eventDisableTiming))
                self._marks.append(mark)
            runtime.eventRecord(mark, self._stream.ptr)
            return mark

    def wait(self, mark: Any) -> None:
        with self._here:
            runtime.eventSynchronize(mark)

    def zero(self, target: Buffer) -> None:
        with self._here:
            runtime.memsetAsync(target.ptr, 0, target.n_bytes, self._stream.ptr)

    def _is_pinned(self, array: npt.NDArray[Any]) -> bool:
        if self._aside is not None and self._aside.is_pinned(array):
            return True
        start = array.ctypes.data
        return any(first <= start and start + array.nbytes <= end for first, end in self._pinned)

    # ---- kernels
    def prepare(self, kernels: Sequence[Kernel]) -> None:
        with self._here:
            self.cache.prepare(unit_of(kernel) for kernel in kernels)
            for kernel in kernels:
                self._function(kernel)

    def _function(self, kernel: Kernel) -> int:
        function = self._functions.get(kernel)
        if function is None:
            unit = unit_of(kernel)
            if unit not in self._modules:
                self._modules[unit] = int(driver.moduleLoadData(self.cache.binary(unit)))
            function = self._functions[kernel] = int(driver.moduleGetFunction(self._modules[unit], kernel.name))
        return function

    def launch(self, step: Step) -> None:
        with self._here:
            self._launch(step)

    def _launch(self, step: Step) -> None:
        if isinstance(step, Gemm):
            self._gemm(step)
            return
        if isinstance(step, Reduce):
            data = step.data.ptr
            self._reduced.add(step.n)
            self._communicator.allReduce(data, data, step.n, _NCCL_FLOAT32, _NCCL_SUM, self._stream.ptr)
            return
        function = self._function(step.kernel)
        # also below 48 KiB: what the function declares counts too
        if step.shared_bytes > self._shared_of.get(function, 0):
            driver.funcSetAttribute(function, DYNAMIC_SHARED, step.shared_bytes)
            self._shared_of[function] = step.shared_bytes
        self._launcher.launch(function, step, overlap=step.overlap and self._overlap)

    def _gemm(self, gemm: Gemm) -> None:
        if self._blas is None:
            self._blas = CuBLAS(self._stream.ptr, self.alloc(WORKSPACE_BYTES))
        self._blas.gemm(gemm)

    def capture(self, steps: Sequence[Step]) -> Any:
        self.prepare([step.kernel for step in steps if isinstance(step, Launch)])
        with self._here:
            # once outside of the capture: cuBLAS loads kernels, and NCCL connects GPUs, when they are first used for a size
            for step in steps:
                if isinstance(step, Gemm) or (isinstance(step, Reduce) and step.n not in self._reduced):
                    self._launch(step)
            self._stream.begin_capture()
            try:
                for step in steps:
                    self._launch(step)
            except BaseException:
                with suppress(*_ERRORS):  # that the capture is of no use is known
                    self._stream.end_capture()
                raise
            return self._stream.end_capture()

    def run(self, executable: Any) -> None:
        with self._here:
            executable.launch(self._stream)

    def synchronize(self) -> None:
        with self._here:
            runtime.streamSynchronize(self._stream.ptr)

    def close(self) -> None:
        """Of a device that is lost only the process's end gives anything back."""
        if self._here.is_lost:
            return
        with self._here:
            runtime.streamSynchronize(self._stream.ptr)
            for part in (self._aside, self._blas, self._pieces):
                if part is not None:
                    part.close()
            for module in self._modules.values():
                driver.moduleUnload(module)
            for event in (*self._marks, *([] if self._order is None else [self._order])):
                runtime.eventDestroy(event)
            for ptr in self._allocated:
                runtime.free(ptr)
            for ptr, _ in self._pinned:
                runtime.freeHost(ptr)
        for held in (self._modules, self._functions, self._shared_of, self._marks, self._allocated, self._pinned):
            held.clear()
        self._aside = self._blas = self._pieces = self._order = None
        self._chunk_left = 0
