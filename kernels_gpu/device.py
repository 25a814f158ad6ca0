"""What the backend needs of a GPU. `cupy_device` is a real one; the tests have another that runs the kernels on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyinfer.kernels_gpu.launch import Buffer, Kernel, Step

Bytes = npt.NDArray[np.uint8]


class Device(Protocol):
    """One GPU with one stream: everything happens in the order in which it is asked for.

    Buffers are never freed one by one: they come from one arena and go with `close`.
    """

    name: str
    arch: int  # compute capability times ten: 75, 80, 89, 90
    n_sms: int  # streaming multiprocessors
    shared_bytes: int  # largest shared memory of a block, opt-in included

    def memory(self) -> tuple[int, int]:
        """Bytes (free, total)."""
        ...

    def alloc(self, n_bytes: int) -> Buffer:
        """Memory of unknown content; DeviceMemoryError when there is not enough."""
        ...

    def alloc_pinned(self, n_bytes: int) -> Bytes:
        """Host memory from and to which copies need not wait."""
        ...

    def upload(self, target: Buffer, source: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy a contiguous array to byte `offset`; from pinned memory, which must then stay as it is until `synchronize`,
        without waiting."""
        ...

    def download(self, source: Buffer, target: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy from byte `offset` into a contiguous array; into pinned memory the copy is done only after `synchronize`."""
        ...

    def copy(self, target: Buffer, source: Buffer, n_bytes: int) -> None:
        """From device memory to device memory."""
        ...

    def can_receive(self, other: Device) -> bool:
        """Whether `receive` can copy from that device; never from itself."""
        ...

    def receive(self, other: Device, target: Buffer, source: Buffer, n_bytes: int) -> None:
        """Copy from another device's memory, behind what that one was asked for so far; what it is asked for next waits for
        the copy, and the host for neither."""
        ...

    def pin(self, arrays: Sequence[npt.NDArray[Any]]) -> bool:
        """Have host memory, as of a mapped file, pinned where it is, for `copy_aside`; False if that cannot be."""
        ...

    def copy_aside(self, slot: int, copies: Sequence[tuple[Buffer, npt.NDArray[Any]]]) -> None:
        """Copy contiguous arrays on a second stream, behind the last `end_of_slot` of this slot; what was not pinned by the
        calling thread, which may be another than the device's."""
        ...

    def wait_for_copies(self, slot: int) -> None:
        """What is asked for from now on comes behind the slot's copies."""
        ...

    def end_of_slot(self, slot: int) -> None:
        """The slot's next copies come behind what was asked for so far."""
        ...

    def record(self, mark: Any = None) -> Any:
        """A mark behind what was asked for so far, for `wait`; a mark that is given is moved there."""
        ...

    def wait(self, mark: Any) -> None:
        """Until what is before the mark has happened; BackendError when a kernel failed."""
        ...

    def zero(self, target: Buffer) -> None: ...

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """Compile and load, so that no launch has to wait for it."""
        ...

    def launch(self, step: Step) -> None: ...

    def capture(self, steps: Sequence[Step]) -> Any:
        """A CUDA graph of these steps, for `run`."""
        ...

    def run(self, executable: Any) -> None: ...

    def synchronize(self) -> None:
        """Wait until all that was asked for has happened; BackendError when a kernel failed."""
        ...

    def close(self) -> None: ...
