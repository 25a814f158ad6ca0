"""The NVIDIA driver over ctypes: which GPUs there are. It needs no CUDA toolkit and no CuPy."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Protocol

from pyinfer.graph.backend import DeviceInfo

_LIBRARIES = {"win32": ("nvcuda.dll",)}.get(sys.platform, ("libcuda.so.1", "libcuda.so"))
CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class DriverError(Exception):
    """A call of the driver failed; `code` is its CUresult."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call} says: {text}")
        self.code = code


class Driver(Protocol):
    """What is asked of the driver; tests have another."""

    def version(self) -> int:
        """The newest CUDA that it serves: 12040 is 12.4."""
        ...

    def devices(self) -> Sequence[DeviceInfo]:
        """Every GPU that this process may use; DriverError where that is none."""
        ...


def load_driver() -> Driver | None:
    """None where no driver is installed."""
    for name in _LIBRARIES:
        try:
            return _CUDADriver(ctypes.CDLL(name))
        except OSError:
            continue
    return None


class _CUDADriver:
    """https://docs.nvidia.com/cuda/cuda-driver-api"""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def version(self) -> int:
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return version.value

    def devices(self) -> Sequence[DeviceInfo]:
        self._call("cuInit", 0)
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise DriverError("cuDeviceGetCount", NO_DEVICE, "no device")
        return [self._device(index) for index in range(count.value)]

    def _device(self, index: int) -> DeviceInfo:
        device, value = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), device)
        capability = []
        for attribute in CAPABILITY:
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            capability.append(value.value)
        free, total = self._memory(device)
        return DeviceInfo(index, name.value.decode("utf-8", "replace"), 10 * capability[0] + capability[1], free, total)

    def _memory(self, device: ctypes.c_int) -> tuple[int, int]:
        """(free, total). Asking takes the context that the device's work will run in anyway."""
        context = ctypes.c_void_p()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)
        return free.value, total.value

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(name, code, text.value.decode() if text.value else f"error {code}")
