"""Name -> backend: the one place where the runtime reaches kernels."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfer.errors import BackendError
from pyinfer.graph.backend import Backend, DeviceInfo

BACKENDS = ("cpu", "gpu", "reference")


def open_backend(name: str, device: int = 0) -> Backend:
    """A backend by name; imports its kernels only now. `BackendError` for an unknown one.

    `device` is the number of one of the `gpus`, which say what is missing where there are none.
    """
    if name == "cpu":
        from pyinfer.kernels_cpu.backend import CPUBackend

        return CPUBackend()
    if name == "gpu":
        from pyinfer.kernels_gpu.backend import GPUBackend

        return GPUBackend(device)
    if name == "reference":
        from pyinfer.graph.reference import ReferenceBackend

        return ReferenceBackend()
    raise BackendError(f"backend {name!r} is not known; known: {', '.join(BACKENDS)}", param="backend")


def open_ranks(devices: Sequence[int]) -> list[Backend]:
    """A backend for each of several GPUs that add up what they have (`graph.tensor_split`)."""
    from pyinfer.kernels_gpu.backend import rank_backends

    return list(rank_backends(devices))


def gpus() -> list[DeviceInfo]:
    """The GPUs that can be used; `BackendError` says why there is none. Imports nothing but the driver's library."""
    from pyinfer.kernels_gpu.requirements import usable_gpus

    return usable_gpus()
