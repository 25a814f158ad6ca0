"""`cuLaunchKernelEx` over ctypes: the one launch call that takes attributes, which CuPy's do not.

https://docs.nvidia.com/cuda/cuda-driver-api, "Execution Control".
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu.launch import Buffer, Launch

OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


class Launcher:
    """Launches functions of loaded modules on one stream of the current context."""

    def __init__(self, library: ctypes.CDLL, stream: int) -> None:
        self._library = library
        self._stream = stream

    def launch(self, function: int, launch: Launch, *, overlap: bool) -> None:
        """BackendError with the driver's words if it refuses."""
        words = [as_word(arg) for arg in launch.args]
        pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
        config = Config()
        config.grid[:], config.block[:] = launch.grid, launch.block
        config.shared_bytes, config.stream = launch.shared_bytes, self._stream
        attribute = Attribute(id=OVERLAP, value=1)
        if overlap:
            config.attributes, config.n_attributes = ctypes.pointer(attribute), 1
        code = self._library.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            reason = text.value.decode() if text.value else f"error {code}"
            raise BackendError(f"the GPU refuses to launch {launch.kernel} on {launch.grid} x {launch.block}: {reason}")


def kind_of(arg: Buffer | int | float | np.int64 | None) -> str:
    """p pointer, i int, l long long, f float."""
    if arg is None or isinstance(arg, Buffer):
        return "p"
    if isinstance(arg, np.int64):
        return "l"
    return "i" if isinstance(arg, int) else "f"


def as_word(arg: Buffer | int | float | np.int64 | None) -> Any:
    """The argument as the C type that the kernel takes."""
    if arg is None or isinstance(arg, Buffer):
        return ctypes.c_void_p(arg.ptr if arg else None)
    if isinstance(arg, np.int64):
        return ctypes.c_int64(int(arg))
    if isinstance(arg, int):
        assert -(2**31) <= arg < 2**31, f"{arg} is no int of 32 bits; pass an np.int64 for a long long"
        return ctypes.c_int32(arg)
    return ctypes.c_float(arg)
