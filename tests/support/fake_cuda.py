"""CuPy, the CUDA driver and cuBLAS as `CuPyDevice` uses them, over the emulator: work is done when the host waits, not before.

So memory that changes while a copy from it is under way gives wrong results, as on a GPU. Every device has one stream with its
own queue; streams in `eager` work at once, so that what waits for nobody is too early or too late. Functions have the arguments
and names of CuPy 14.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
from cuda_emulator.build import EmulatorError, compiled
from cuda_emulator.build import runtime as emulator
from cuda_emulator.device import _gemm

from pyinfer.kernels_gpu.kernel_cache import KernelCache, Unit
from pyinfer.kernels_gpu.launch import Buffer, Gemm, GemmType, Kernel
from pyinfer.kernels_gpu.toolkit import driver_major

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
ASIDE = 9000  # the second stream of device 0
STREAM = 4711  # of device 0; that of device 1 is the next number
_FAULT = 700  # cudaErrorIllegalAddress
_Work = Callable[[], object]


class CUDARuntimeError(RuntimeError):
    """Of `cupy.cuda.runtime`, and of `cupy.cuda.driver`."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class FakeCUDA:
    """The state of one process: memory, loaded kernels, and what was asked for and is not done yet."""

    def __init__(
        self,
        n_bytes: int = 1 << 30,
        driver_version: int = 12080,
        capability: tuple[int, int] = (9, 0),
        eager: tuple[int, ...] = (),
        peers: bool = True,
    ) -> None:
        self.free, self.total = n_bytes, n_bytes
        self.driver_version, self.capability = driver_version, capability
        self.allocated: dict[int, int] = {}
        self.pinned: dict[int, Any] = {}
        self.eager, self.peers = {STREAM + device for device in eager}, peers
        self.device = 0
        self.queues: dict[int, list[_Work]] = {}
        self.events: dict[int, tuple[int, _Work]] = {}  # event -> the stream it was recorded on, and its place there
        self.peer_access: set[tuple[int, int]] = set()
        self.peer_copies = 0
        self._lock = threading.RLock()  # a thread may copy while another launches
        self.registered: dict[int, int] = {}  # memory that is pinned where it is
        self.can_register, self.is_aside_eager = True, False
        self.captured: list[_Work] | None = None
        self.units: list[Unit] = []
        self.functions: list[Kernel] = []
        self.dynamic_shared: dict[int, int] = {}
        self.overlapping = 0
        self.graphs = 0
        self.has_workspace = False
        self.has_faulted = False  # a kernel has: every call fails
        self.refuses_graphs = False  # for want of memory

    # ---- order
    @property
    def queue(self) -> list[_Work]:
        """Of the current device."""
        return self.queues.setdefault(STREAM + self.device, [])

    def submit(self, work: _Work, stream: int | None = None) -> None:
        stream = STREAM + self.device if stream is None else stream
        if self.captured is not None and stream < ASIDE:
            self.captured.append(work)
            return
        self.queues.setdefault(stream, []).append(work)
        if stream in self.eager or (stream >= ASIDE and self.is_aside_eager):
            self.finish(stream)

    def finish(self, stream: int) -> None:
        assert self.captured is None or stream >= ASIDE, "the host waits in a capture"
        with self._lock:
            queue = self.queues.setdefault(stream, [])
            while queue:
                queue.pop(0)()

    def record(self, event: int, stream: int) -> None:
        def here() -> None: ...

        self.events[event] = stream, here
        self.submit(here, stream)

    def wait_for(self, event: int) -> None:
        """Do what was asked for before the event was recorded."""
        if event in self.events:
            stream, place = self.events[event]
            self._until(stream, place)

    def _until(self, stream: int, place: _Work) -> None:
        with self._lock:
            queue = self.queues.setdefault(stream, [])
            while place in queue:
                queue.pop(0)()

    def stream_wait(self, stream: int, event: int) -> None:
        other, place = self.events[event]
        self.submit(lambda: self._until(other, place), stream)

    def peer_copy(self, dst: int, dst_device: int, src: int, src_device: int, size: int, stream: int) -> None:
        assert dst_device != src_device and stream == STREAM + dst_device
        assert (dst_device, src_device) in self.peer_access, "it would go through the host"
        self.peer_copies += 1
        self.submit(lambda: ctypes.memmove(dst, src, size), stream)

    def enable_peer(self, device: int) -> None:
        if (self.device, device) in self.peer_access:
            raise CUDARuntimeError("cudaErrorPeerAccessAlreadyEnabled: peer access is already enabled")
        self.peer_access.add((self.device, device))

    # ---- cupy.cuda.runtime
    def malloc(self, size: int) -> int:
        if size > self.free:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory", 2)
        self.free -= size
        ptr = int(emulator().emulator_alloc(size))
        self.allocated[ptr] = size
        return ptr

    def release(self, ptr: int) -> None:
        self.free += self.allocated.pop(ptr)
        emulator().emulator_free(ptr)

    def host_alloc(self, size: int, flags: int) -> int:
        memory = ctypes.create_string_buffer(size)
        self.pinned[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _is_pinned(self, ptr: int, size: int) -> bool:
        pinned = {**{start: len(memory) for start, memory in self.pinned.items()}, **self.registered}
        return any(start <= ptr and ptr + size <= start + length for start, length in pinned.items())

    def register(self, ptr: int, size: int, flags: int) -> None:
        assert flags == 9 and not any(ptr < start + n and start < ptr + size for start, n in self.registered.items())
        if not self.can_register:
            raise CUDARuntimeError("cudaErrorNotSupported: operation not supported")
        self.registered[ptr] = size

    def memcpy_async(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        assert stream in (STREAM + self.device, ASIDE + self.device)
        host = {HOST_TO_DEVICE: src, DEVICE_TO_HOST: dst}.get(kind)
        for ptr in {HOST_TO_DEVICE: (dst,), DEVICE_TO_HOST: (src,), DEVICE_TO_DEVICE: (dst, src)}[kind]:
            assert any(start <= ptr and ptr + size <= start + n for start, n in self.allocated.items()), (
                "no device memory"
            )
        if host is None or self._is_pinned(host, size):
            self.submit(lambda: ctypes.memmove(dst, src, size), stream)
            return
        self.finish(stream)  # pageable memory: the call returns when it is done with it
        ctypes.memmove(dst, src, size)

    def memset_async(self, ptr: int, value: int, size: int, stream: int) -> None:
        self.submit(lambda: ctypes.memset(ptr, value, size))

    # ---- cupy.cuda.driver and the driver's library
    def load(self, image: bytes) -> int:
        source, defines = json.loads(image)
        self.units.append((source, tuple((name, value) for name, value in defines)))
        return len(self.units)

    def get_function(self, module: int, name: str) -> int:
        self.functions.append(Kernel(self.units[module - 1][0], name, self.units[module - 1][1]))
        return len(self.functions)

    def set_attribute(self, function: int, attribute: int, value: int) -> None:
        assert attribute == 8
        self.dynamic_shared[function] = value

    def launch(self, config: Any, function: Any, pointers: Any, extra: None) -> int:
        if self.has_faulted:
            return _FAULT
        config = config._obj
        assert config.stream == STREAM + self.device
        kernel = compiled(self.functions[function.value - 1])
        allowed = self.dynamic_shared.get(function.value, (48 << 10) - kernel.static_shared)
        if config.shared_bytes > min(allowed, (227 << 10) - kernel.static_shared):
            return 1
        self.overlapping += config.n_attributes
        sizes = [4 if kind in "if" else 8 for kind in kernel.signature]
        assert len(sizes) == len(pointers), "arguments"
        copies = [ctypes.create_string_buffer(ctypes.string_at(p, n), 8) for p, n in zip(pointers, sizes, strict=True)]
        args = (ctypes.c_void_p * len(copies))(*(ctypes.addressof(copy) for copy in copies))
        grid, block = (ctypes.c_uint * 3)(*config.grid), (ctypes.c_uint * 3)(*config.block)
        shared_bytes = config.shared_bytes

        def run(_: Any = copies) -> None:
            text = emulator().emulator_launch(
                kernel.call, kernel.poison, ctypes.cast(args, ctypes.c_void_p), ctypes.cast(grid, ctypes.c_void_p),
                ctypes.cast(block, ctypes.c_void_p), shared_bytes, 0,
            )  # fmt: skip
            if text:
                raise EmulatorError(text.decode())

        self.submit(run)
        return 0

    def get_version(self, version: Any) -> int:
        version._obj.value = self.driver_version
        return 0

    # ---- cuBLAS
    def gemm(self, handle: Any, *args: Any) -> int:
        """out.T = w @ x.T in columns, which is out = x @ w.T in rows."""
        (
            trans_w,
            trans_x,
            n,
            m,
            k,
            alpha,
            w,
            type_w,
            ldw,
            x,
            type_x,
            ldx,
            beta,
            out,
            type_out,
            ldo,
            compute,
            algorithm,
        ) = args
        assert self.has_workspace, "cuBLAS would allocate"
        assert (trans_w, trans_x, type_w, algorithm) == (1, 0, type_x, -1) and type_out in (0, 2)
        assert self.math_mode == 16, "sums of parts in the type of results"
        kind: GemmType = "f32" if type_w == 0 else "f16"
        assert (type_w, compute) in ((2, 68), (0, 69)), "TF32 or sums in float16"
        assert ldw >= k and ldx == k and ldo >= n
        size = 4 if kind == "f32" else 2
        factors = [factor._obj.value for factor in (alpha, beta)]
        assert factors[1] in (0.0, 1.0)
        gemm = Gemm(
            Buffer(out.value, (2 if type_out else 4) * ((m - 1) * ldo + n)), Buffer(x.value, size * m * k),
            Buffer(w.value, size * ((n - 1) * ldw + k)), m, n, k, ldo, bool(factors[1]), factors[0], kind, ldw,
            type_out == 2,
        )  # fmt: skip
        self.submit(lambda: _gemm(gemm))
        return 0

    def set_workspace(self, handle: Any, memory: Any, size: Any) -> int:
        assert self.allocated and memory.value % 16 == 0 and size.value > 0
        self.has_workspace = True
        return 0

    def set_math_mode(self, handle: Any, mode: int) -> int:
        self.math_mode = mode
        return 0

    def set_blas_stream(self, handle: Any, stream: Any) -> int:
        assert stream.value == STREAM + self.device
        self.has_workspace = False  # as setting the stream takes it away
        return 0

    def blas(self) -> ModuleType:
        library = ModuleType("libcublas")
        vars(library).update(
            cublasCreate_v2=lambda handle: 0, cublasSetStream_v2=self.set_blas_stream,
            cublasSetWorkspace_v2=self.set_workspace, cublasGemmEx=self.gemm, cublasDestroy_v2=lambda handle: 0,
            cublasSetMathMode=self.set_math_mode,
        )  # fmt: skip
        return library

    def _told(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """CUDA's calls after a fault."""

        def call(*args: Any) -> Any:
            if self.has_faulted:
                raise CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered", _FAULT)
            return function(*args)

        return call

    def modules(self) -> dict[str, ModuleType]:
        """What stands in `sys.modules` for CuPy."""
        fake = self

        class Graph:
            def __init__(self, work: list[Callable[[], object]]) -> None:
                self.work = work
                fake.graphs += 1

            def launch(self, stream: Stream) -> None:
                assert stream.ptr == STREAM + fake.device
                for work in self.work:
                    fake.submit(work)

        class Stream:
            def __init__(self, non_blocking: bool = False) -> None:
                assert non_blocking, "the default stream would wait for other work of the process"
                self.ptr = STREAM + fake.device

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

            def begin_capture(self) -> None:
                fake.captured = []

            def end_capture(self) -> Graph:
                work, fake.captured = fake.captured, None
                assert work is not None
                if fake.refuses_graphs:
                    raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory", 2)
                return Graph(work)

        major, minor = self.capability
        properties = {"name": b"Fake GPU", "major": major, "minor": minor, "multiProcessorCount": 4}
        events = count(1)
        names = {
            "setDevice": lambda device: setattr(self, "device", device), "getDeviceProperties": lambda device: properties,
            "deviceGetAttribute": lambda attribute, device: 227 << 10, "cudaDevAttrMaxSharedMemoryPerBlockOptin": 97,
            "driverGetVersion": lambda: self.driver_version, "memGetInfo": lambda: (self.free, self.total),
            "malloc": self.malloc, "free": self.release, "hostAlloc": self.host_alloc, "hostAllocPortable": 1,
            "freeHost": self.pinned.pop, "memcpyAsync": self.memcpy_async,
            "memcpyHostToDevice": HOST_TO_DEVICE, "memcpyDeviceToHost": DEVICE_TO_HOST,
            "memcpyDeviceToDevice": DEVICE_TO_DEVICE, "memsetAsync": self.memset_async,
            "eventCreateWithFlags": lambda flags: next(events), "eventDisableTiming": 2, "eventRecord": self.record,
            "eventSynchronize": self.wait_for, "eventDestroy": lambda event: None, "streamSynchronize": self.finish,
            "deviceSynchronize": lambda: self.finish(STREAM + self.device),
            "streamWaitEvent": self.stream_wait, "memcpyPeerAsync": self.peer_copy,
            "deviceCanAccessPeer": lambda device, peer: int(self.peers), "deviceEnablePeerAccess": self.enable_peer,
            "streamCreateWithFlags": lambda flags: ASIDE + self.device, "streamNonBlocking": 1,
            "streamDestroy": lambda stream: None, "hostRegister": self.register, "hostUnregister": self.registered.pop,
            "CUDARuntimeError": CUDARuntimeError,
        }  # fmt: skip
        names = {
            name: self._told(each) if callable(each) and each is not CUDARuntimeError else each
            for name, each in names.items()
        }
        modules = {name: ModuleType(name) for name in ("cupy", "cupy.cuda")}
        modules["cupy"].cuda = modules["cupy.cuda"]  # type: ignore[attr-defined]
        parts: dict[str, dict[str, Any]] = {
            "runtime": names,
            "driver": {
                "moduleLoadData": self.load, "moduleGetFunction": self.get_function,
                "funcSetAttribute": self.set_attribute, "moduleUnload": lambda module: None,
                "CUDADriverError": CUDARuntimeError,
            },
        }  # fmt: skip
        for name, members in parts.items():
            modules[f"cupy.cuda.{name}"] = ModuleType(name)
            vars(modules[f"cupy.cuda.{name}"]).update(members)
            setattr(modules["cupy.cuda"], name, modules[f"cupy.cuda.{name}"])
        modules["cupy.cuda"].Stream = Stream  # type: ignore[attr-defined]
        return modules


@contextmanager
def fake_cuda(fake: FakeCUDA) -> Iterator[Any]:
    """The module `cupy_device` as it is with this CUDA in place."""
    library, blas, load = ModuleType("libcuda"), fake.blas(), ctypes.CDLL
    library.cuLaunchKernelEx = fake.launch  # type: ignore[attr-defined]
    library.cuGetErrorString = lambda code, text: None  # type: ignore[attr-defined]
    library.cuDriverGetVersion = fake.get_version  # type: ignore[attr-defined]

    def open_library(name: str, *args: Any, **options: Any) -> Any:
        known = {"cuda.so": library, "cublas": blas}
        found = next((fake for part, fake in known.items() if part in str(name)), None)
        return load(name, *args, **options) if found is None else found

    def no_compiler(cache: KernelCache, units: Any) -> None:
        for unit in units:
            cache._binaries[unit] = json.dumps(unit).encode()

    name = "pyinfer.kernels_gpu.cupy_device"
    sys.modules.pop(name, None)
    driver_major.cache_clear()
    with (
        patch.dict(sys.modules, fake.modules()),
        patch.object(ctypes, "CDLL", open_library),
        patch.object(KernelCache, "prepare", no_compiler),
    ):
        import pyinfer.kernels_gpu.cupy_device as module

        yield module
    sys.modules.pop(name, None)
    driver_major.cache_clear()


def as_floats(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)
