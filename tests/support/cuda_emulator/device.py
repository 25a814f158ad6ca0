"""`EmulatedDevice`: the `Device` of tests. Buffers are host memory between guard pages, launches run on the calling thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_emulator.build import CompiledKernel, EmulatorError, compile_all, compiled, runtime
from pyinfer.errors import DeviceMemoryError
from pyinfer.kernels_gpu.cuda_launch import as_word, kind_of
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer, Gemm, Kernel, Launch, Reduce, Step

STATIC_SHARED = 48 << 10  # what a function may declare
_EMULATOR = threading.RLock()  # it knows one launch at a time
MAX_THREADS, MAX_GRID = 1024, (2**31 - 1, 65535, 65535)


class EmulatedDevice:
    """See `kernels_gpu.device.Device`. With `descending` blocks and threads run from the last to the first.

    `launches` counts the steps by kernel name, for tests that ask what was launched.
    """

    def __init__(
        self,
        *,
        arch: int = 90,
        n_sms: int = 4,
        n_bytes: int = 1 << 30,
        descending: bool = False,
        shared_bytes: int = 227 << 10,
        all_reduce: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] | None = None,
    ) -> None:
        """`all_reduce` sums over the devices of a tensor split, which are threads and run their kernels in turn."""
        self.all_reduce = all_reduce
        self.name, self.arch, self.n_sms, self.shared_bytes = "emulated", arch, n_sms, shared_bytes
        self.descending = descending
        self.can_pin = True  # host memory where it is
        self.peers = True  # whether it can read the memory of other devices
        self.launches: dict[str, int] = {}
        self._total, self._used = n_bytes, 0
        self._buffers: list[int] = []

    def memory(self) -> tuple[int, int]:
        return self._total - self._used, self._total

    def alloc(self, n_bytes: int) -> Buffer:
        if self._used + n_bytes > self._total:
            raise DeviceMemoryError(
                f"{n_bytes} bytes of GPU memory are asked for and {self._total - self._used} are free"
            )
        with _EMULATOR:
            address = runtime().emulator_alloc(n_bytes)
        assert address, "no memory"
        self._used += n_bytes
        self._buffers.append(address)
        return Buffer(address, n_bytes)

    def alloc_pinned(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.zeros(n_bytes, np.uint8)

    def upload(self, target: Buffer, source: npt.NDArray[Any], offset: int = 0) -> None:
        assert source.flags.c_contiguous
        ctypes.memmove(target.at(offset, source.nbytes).ptr, source.ctypes.data, source.nbytes)

    def download(self, source: Buffer, target: npt.NDArray[Any], offset: int = 0) -> None:
        assert target.flags.c_contiguous and target.flags.writeable
        ctypes.memmove(target.ctypes.data, source.at(offset, target.nbytes).ptr, target.nbytes)

    def copy(self, target: Buffer, source: Buffer, n_bytes: int) -> None:
        ctypes.memmove(target.at(0, n_bytes).ptr, source.at(0, n_bytes).ptr, n_bytes)

    def can_receive(self, other: Device) -> bool:
        return self.peers and isinstance(other, EmulatedDevice) and other is not self

    def receive(self, other: Device, target: Buffer, source: Buffer, n_bytes: int) -> None:
        assert self.can_receive(other)
        self._count("receive")
        self.copy(target, source, n_bytes)

    def pin(self, arrays: Sequence[npt.NDArray[Any]]) -> bool:
        return self.can_pin

    def copy_aside(self, slot: int, copies: Sequence[tuple[Buffer, npt.NDArray[Any]]]) -> None:
        self._count("copy aside")
        for target, source in copies:
            self.upload(target, source)

    def wait_for_copies(self, slot: int) -> None: ...

    def end_of_slot(self, slot: int) -> None: ...

    def record(self, mark: Any = None) -> Any:
        return self

    def wait(self, mark: Any) -> None:
        assert mark is self

    def zero(self, target: Buffer) -> None:
        ctypes.memset(target.ptr, 0, target.n_bytes)

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        with _EMULATOR:
            compile_all(list(dict.fromkeys(kernels)))

    def launch(self, step: Step) -> None:
        if isinstance(step, Gemm):
            self._count("gemm")
            _gemm(step)
            return
        if isinstance(step, Reduce):
            self._count("reduce")
            self._reduce(step)
            return
        self._count(step.kernel.name)
        with _EMULATOR:
            self._run(step)

    def _reduce(self, step: Reduce) -> None:
        assert self.all_reduce is not None, "one device alone"
        self.upload(step.data, self.all_reduce(self.values(step.data, np.float32, step.n)))

    def capture(self, steps: Sequence[Step]) -> list[Step]:
        self.prepare([step.kernel for step in steps if isinstance(step, Launch)])
        return list(steps)

    def run(self, executable: list[Step]) -> None:
        for step in executable:
            self.launch(step)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        with _EMULATOR:
            for address in self._buffers:
                runtime().emulator_free(address)
        self._buffers.clear()
        self._used = 0

    # ---- for tests
    def array(self, values: npt.NDArray[Any]) -> Buffer:
        """A new buffer that holds a copy of these values."""
        values = np.ascontiguousarray(values)
        buffer = self.alloc(values.nbytes)
        self.upload(buffer, values)
        return buffer

    def empty(self, *shape: int, dtype: npt.DTypeLike = np.float32) -> Buffer:
        """A new buffer for so many elements, poisoned with NaN."""
        return self.alloc(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)

    def values(self, buffer: Buffer, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        """What a buffer holds, as an array of this shape (default: one dimension)."""
        size = buffer.n_bytes // np.dtype(dtype).itemsize if not shape else int(np.prod(shape))
        out = np.empty(size, dtype)
        self.download(buffer, out)
        return out.reshape(shape or size)

    def _count(self, name: str) -> None:
        self.launches[name] = self.launches.get(name, 0) + 1

    def _run(self, launch: Launch) -> None:
        kernel = compiled(launch.kernel)
        problem = check_limits(launch, kernel, self.shared_bytes)
        if problem is None:
            words = [as_word(arg) for arg in launch.args]
            pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
            grid, block = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.block)
            text = runtime().emulator_launch(
                kernel.call, kernel.poison, ctypes.cast(pointers, ctypes.c_void_p), ctypes.cast(grid, ctypes.c_void_p),
                ctypes.cast(block, ctypes.c_void_p), launch.shared_bytes, int(self.descending),
            )  # fmt: skip
            problem = text.decode() if text else None
        if problem:
            raise EmulatorError(
                f"{launch.kernel} <<<{launch.grid}, {launch.block}, {launch.shared_bytes}>>>: {problem}"
            )


def check_limits(launch: Launch, kernel: CompiledKernel, shared_bytes: int) -> str | None:
    """What a GPU would refuse, and arguments that are not what the function takes."""
    kinds = "".join(kind_of(arg) for arg in launch.args)
    if kinds != kernel.signature:
        return f"arguments are {kinds}, the function takes {kernel.signature} (p pointer, i int, l long long, f float)"
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if not 0 < threads <= MAX_THREADS or launch.block[2] > 64:
        return f"a block of {threads} threads"
    if any(not 0 < size <= limit for size, limit in zip(launch.grid, MAX_GRID, strict=True)):
        return "a grid out of its limits"
    if kernel.static_shared > STATIC_SHARED:
        return f"{kernel.static_shared} bytes of shared memory are declared, of {STATIC_SHARED}"
    if launch.shared_bytes + kernel.static_shared > shared_bytes:
        return f"{launch.shared_bytes} + {kernel.static_shared} bytes of shared memory, of {shared_bytes}"
    return None


def _gemm(gemm: Gemm) -> None:
    def array(buffer: Buffer, dtype: npt.DTypeLike, rows: int, columns: int, stride: int) -> npt.NDArray[Any]:
        size = np.dtype(dtype).itemsize
        n_bytes = size * ((rows - 1) * stride + columns)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(buffer.at(0, n_bytes).ptr))
        return np.lib.stride_tricks.as_strided(raw.view(dtype), (rows, columns), (size * stride, size))

    kind = {"f16": np.float16, "f32": np.float32}[gemm.kind]
    w_stride = gemm.w_stride or gemm.k
    assert gemm.out_stride >= gemm.n and w_stride >= gemm.k
    x, w = array(gemm.x, kind, gemm.m, gemm.k, gemm.k), array(gemm.w, kind, gemm.n, gemm.k, w_stride)
    product = np.float32(gemm.alpha) * (x.astype(np.float32) @ w.astype(np.float32).T)
    out = array(gemm.out, np.float16 if gemm.halves else np.float32, gemm.m, gemm.n, gemm.out_stride)
    out[:] = product + out if gemm.accumulate else product
