"""`OnDevice`: whose turn it is, and what CUDA's errors are called."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from pyinfer.errors import BackendError, DeviceLostError, DeviceMemoryError

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY


class OnDevice:
    """`with` it, calls of this thread go to one device, and what CUDA raises comes out as a BackendError.

    After a fault in a kernel every call fails, as CUDA's context is gone: that is a DeviceLostError. As faults are told late,
    by whatever is called next, each error is followed by a question whether the device still answers.
    """

    def __init__(self, runtime: Any, errors: tuple[type[Exception], ...], index: int) -> None:
        """`errors` are those that CUDA's calls raise, with a `status`; `runtime` is CUDA's as CuPy has it."""
        self._runtime, self._errors, self._index = runtime, errors, index
        self.name = f"GPU {index}"  # in messages
        self.is_lost = False

    def __enter__(self) -> None:
        try:
            self._runtime.setDevice(self._index)
        except self._errors as error:
            raise self._told(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None or isinstance(error, DeviceLostError):
            return
        if isinstance(error, (BackendError, *self._errors)):
            told = self._told(error)
            if told is not error:
                raise told from error

    def _told(self, error: BaseException) -> BaseException:
        text = f"{self.name} failed: {error}"
        try:
            self._runtime.deviceSynchronize()
        except self._errors:
            self.is_lost = True
            return DeviceLostError(text)
        if isinstance(error, BackendError):
            return error
        is_memory = getattr(error, "status", None) == OUT_OF_MEMORY
        return DeviceMemoryError(text, param="n_gpu_layers") if is_memory else BackendError(text)
