"""Name -> backend: the one place where the runtime reaches kernels."""

from __future__ import annotations

from pyinfer.errors import BackendError
from pyinfer.graph.backend import Backend

BACKENDS = ("cpu", "reference")


def open_backend(name: str) -> Backend:
    """A backend by name; imports its kernels only now. `BackendError` for what is unknown or not built."""
    if name == "cpu":
        from pyinfer.kernels_cpu.backend import CPUBackend

        return CPUBackend()
    if name == "reference":
        from pyinfer.graph.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "gpu":
        raise BackendError("this version has no GPU backend; use n_gpu_layers=0", param="n_gpu_layers")
    raise BackendError(f"backend {name!r} is not known; known: {', '.join(BACKENDS)}", param="backend")
