"""cuBLAS over ctypes: matrix products on one stream that CUDA graphs may hold, which CuPy's own calls refuse to be.

https://docs.nvidia.com/cuda/cublas, "CUDA Graphs Support": with memory of our own as workspace nothing is allocated in a capture.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu.launch import Buffer, Gemm, GemmType
from pyinfer.kernels_gpu.toolkit import driver_major, find_libraries, install

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for sm_90
R_32F, R_16F = 0, 2  # library_types.h
OP_N, OP_T, DEFAULT_ALGORITHM = 0, 1, -1  # cublas_api.h
# CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: parts of sums are not float16, even if results are
SUMS_IN_FLOAT32 = 16
# the type of operands and the arithmetic: sums are float32; "pedantic" is never TF32, whatever the environment asks for
TYPES: dict[GemmType, tuple[int, int]] = {"f16": (R_16F, 68), "f32": (R_32F, 69)}


class CuBLAS:
    """A handle of the current device. Its workspace is set after its stream, which would take it away again."""

    def __init__(self, stream: int, workspace: Buffer) -> None:
        self._library = _load()
        self._handle = ctypes.c_void_p()
        self._check(self._library.cublasCreate_v2(ctypes.byref(self._handle)), "cublasCreate")
        self._check(self._library.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream)), "cublasSetStream")
        self._check(self._library.cublasSetMathMode(self._handle, SUMS_IN_FLOAT32), "cublasSetMathMode")
        size = ctypes.c_size_t(workspace.n_bytes)
        done = self._library.cublasSetWorkspace_v2(self._handle, ctypes.c_void_p(workspace.ptr), size)
        self._check(done, "cublasSetWorkspace")

    def gemm(self, gemm: Gemm) -> None:
        """cuBLAS has columns where we have rows, so it computes out.T = w @ x.T."""
        kind, arithmetic = TYPES[gemm.kind]
        alpha, beta = ctypes.c_float(gemm.alpha), ctypes.c_float(gemm.accumulate)  # read before the call returns
        done = self._library.cublasGemmEx(
            self._handle, OP_T, OP_N, gemm.n, gemm.m, gemm.k, ctypes.byref(alpha),
            ctypes.c_void_p(gemm.w.ptr), kind, gemm.w_stride or gemm.k, ctypes.c_void_p(gemm.x.ptr), kind, gemm.k,
            ctypes.byref(beta), ctypes.c_void_p(gemm.out.ptr), R_16F if gemm.halves else R_32F, gemm.out_stride, arithmetic,
            DEFAULT_ALGORITHM,
        )  # fmt: skip
        self._check(done, f"cublasGemmEx ({gemm.m} x {gemm.n} x {gemm.k}, {gemm.kind})")

    def close(self) -> None:
        self._library.cublasDestroy_v2(self._handle)

    def _check(self, code: int, call: str) -> None:
        if code:
            self._library.cublasGetStatusName.restype = ctypes.c_char_p
            raise BackendError(f"{call} says: {self._library.cublasGetStatusName(code).decode()}")


def _load() -> Any:
    for path in find_libraries("cublas"):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise BackendError(f"no cuBLAS was found; {install(driver_major())}", param="n_gpu_layers")
