"""Name -> backend: the one place where the runtime reaches kernels."""

from __future__ import annotations

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


def gpus() -> list[DeviceInfo]:
    """The GPUs that can be used; `BackendError` says why there is none. Imports nothing but the driver's library."""
    from pyinfer.kernels_gpu.requirements import usable_gpus

    return usable_gpus()
