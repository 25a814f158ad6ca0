"""CuPy and the CUDA driver as `CuPyDevice` uses them, over the emulator: work is done when the host waits, not before.

So memory that changes while a copy from it is under way gives wrong results, as on a GPU. Functions have the arguments and
names of CuPy 14.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
from cuda_emulator.build import EmulatorError, compiled
from cuda_emulator.build import runtime as emulator
from cuda_emulator.device import _gemm

from pyinfer.kernels_gpu.kernel_cache import KernelCache, Unit
from pyinfer.kernels_gpu.launch import Buffer, Gemm, Kernel

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
STREAM = 4711


class CUDARuntimeError(RuntimeError):
    """Of `cupy.cuda.runtime`."""


class FakeCUDA:
    """The state of one process: memory, loaded kernels, and what was asked for and is not done yet."""

    def __init__(
        self, n_bytes: int = 1 << 30, driver_version: int = 12080, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self.free, self.total = n_bytes, n_bytes
        self.driver_version, self.capability = driver_version, capability
        self.allocated: dict[int, int] = {}
        self.pinned: dict[int, Any] = {}
        self.queue: list[Callable[[], object]] = []
        self.captured: list[Callable[[], object]] | None = None
        self.units: list[Unit] = []
        self.functions: list[Kernel] = []
        self.dynamic_shared: dict[int, int] = {}
        self.overlapping = 0
        self.graphs = 0

    # ---- order
    def submit(self, work: Callable[[], object]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def finish(self, *_: int) -> None:
        assert self.captured is None, "the host waits in a capture"
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    # ---- cupy.cuda.runtime
    def malloc(self, size: int) -> int:
        if size > self.free:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
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
        return any(start <= ptr and ptr + size <= start + len(memory) for start, memory in self.pinned.items())

    def memcpy_async(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        assert stream == STREAM
        host = {HOST_TO_DEVICE: src, DEVICE_TO_HOST: dst}.get(kind)
        for ptr in {HOST_TO_DEVICE: (dst,), DEVICE_TO_HOST: (src,), DEVICE_TO_DEVICE: (dst, src)}[kind]:
            assert any(start <= ptr and ptr + size <= start + n for start, n in self.allocated.items()), (
                "no device memory"
            )
        if host is None or self._is_pinned(host, size):
            self.submit(lambda: ctypes.memmove(dst, src, size))
            return
        self.finish()  # pageable memory: the call returns when it is done with it
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
        config = config._obj
        assert config.stream == STREAM
        allowed = self.dynamic_shared.get(function.value, 48 << 10)
        if config.shared_bytes > allowed:
            return 1
        self.overlapping += config.n_attributes
        kernel = compiled(self.functions[function.value - 1])
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

    def gemm(self, handle: int, *args: int) -> None:
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
        assert (trans_w, trans_x, type_w, type_x, type_out, compute, algorithm) == (1, 0, 2, 2, 0, 68, -1)
        assert (ldw, ldx) == (k, k) and ldo >= n
        factors = [ctypes.c_float.from_address(ptr).value for ptr in (alpha, beta)]
        assert factors[1] in (0.0, 1.0)
        gemm = Gemm(
            Buffer(out, 4 * ((m - 1) * ldo + n)), Buffer(x, 2 * m * k), Buffer(w, 2 * n * k), m, n, k, ldo,
            accumulate=bool(factors[1]), alpha=factors[0],
        )  # fmt: skip
        self.submit(lambda: _gemm(gemm))

    def modules(self) -> dict[str, ModuleType]:
        """What stands in `sys.modules` for CuPy."""
        fake = self

        class Graph:
            def __init__(self, work: list[Callable[[], object]]) -> None:
                self.work = work
                fake.graphs += 1

            def launch(self, stream: Stream) -> None:
                for work in self.work:
                    fake.submit(work)

        class Stream:
            ptr = STREAM

            def __init__(self, non_blocking: bool = False) -> None:
                assert non_blocking, "the default stream would wait for other work of the process"

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

            def begin_capture(self) -> None:
                fake.captured = []

            def end_capture(self) -> Graph:
                work, fake.captured = fake.captured, None
                assert work is not None
                return Graph(work)

        major, minor = self.capability
        properties = {"name": b"Fake GPU", "major": major, "minor": minor, "multiProcessorCount": 4}
        names = {
            "setDevice": lambda device: None, "getDeviceProperties": lambda device: properties,
            "deviceGetAttribute": lambda attribute, device: 227 << 10, "cudaDevAttrMaxSharedMemoryPerBlockOptin": 97,
            "driverGetVersion": lambda: self.driver_version, "memGetInfo": lambda: (self.free, self.total),
            "malloc": self.malloc, "free": self.release, "hostAlloc": self.host_alloc, "hostAllocPortable": 1,
            "freeHost": self.pinned.pop, "memcpyAsync": self.memcpy_async,
            "memcpyHostToDevice": HOST_TO_DEVICE, "memcpyDeviceToHost": DEVICE_TO_HOST,
            "memcpyDeviceToDevice": DEVICE_TO_DEVICE, "memsetAsync": self.memset_async,
            "eventCreateWithFlags": lambda flags: 1, "eventDisableTiming": 2, "eventRecord": lambda event, stream: None,
            "eventSynchronize": self.finish, "eventDestroy": lambda event: None, "streamSynchronize": self.finish,
            "CUDARuntimeError": CUDARuntimeError,
        }  # fmt: skip
        modules = {name: ModuleType(name) for name in ("cupy", "cupy.cuda")}
        modules["cupy"].cuda = modules["cupy.cuda"]  # type: ignore[attr-defined]
        parts: dict[str, dict[str, Any]] = {
            "runtime": names,
            "driver": {
                "moduleLoadData": self.load, "moduleGetFunction": self.get_function,
                "funcSetAttribute": self.set_attribute, "moduleUnload": lambda module: None,
            },
            "cublas": {"create": lambda: 1, "destroy": lambda handle: None, "gemmEx": self.gemm},
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
    library, load = ModuleType("libcuda"), ctypes.CDLL
    library.cuLaunchKernelEx = fake.launch  # type: ignore[attr-defined]
    library.cuGetErrorString = lambda code, text: None  # type: ignore[attr-defined]

    def open_library(name: str, *args: Any, **options: Any) -> Any:
        return library if "cuda.so" in str(name) else load(name, *args, **options)

    def no_compiler(cache: KernelCache, units: Any) -> None:
        for unit in units:
            cache._binaries[unit] = json.dumps(unit).encode()

    name = "pyinfer.kernels_gpu.cupy_device"
    sys.modules.pop(name, None)
    with (
        patch.dict(sys.modules, fake.modules()),
        patch.object(ctypes, "CDLL", open_library),
        patch.object(KernelCache, "prepare", no_compiler),
    ):
        import pyinfer.kernels_gpu.cupy_device as module

        yield module
    sys.modules.pop(name, None)


def as_floats(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)
