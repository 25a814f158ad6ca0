"""What a lowered graph is made of: kernels by name and defines, launches with their arguments, matrix products of cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Dim3 = tuple[int, int, int]
Defines = tuple[tuple[str, int | str], ...]
GemmType = Literal["f16", "f32"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes on a device, or a part of them (`at`). Pointers of whole buffers are multiples of 256 (16 in the emulator)."""

    ptr: int
    n_bytes: int

    def at(self, offset: int, n_bytes: int | None = None) -> Buffer:
        """The part from byte `offset` on, to the end or `n_bytes` long."""
        length = self.n_bytes - offset if n_bytes is None else n_bytes
        assert offset >= 0 and length >= 0 and offset + length <= self.n_bytes, (offset, length, self.n_bytes)
        return Buffer(self.ptr + offset, length)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of a file in `kernels_gpu/cuda`, compiled with these macros; equal kernels are one compilation."""

    source: str  # file name: "rows.cu"
    name: str  # of the extern "C" __global__ function
    defines: Defines = ()

    def __str__(self) -> str:
        return f"{self.source}:{self.name}" + "".join(f" {key}={value}" for key, value in self.defines)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel over a grid.

    Arguments in the order of the function: a `Buffer` (or None) is a pointer, an `int` an int, an `np.int64` a long long,
    a `float` a float. With `overlap` the kernel may start while the one before it ends (programmatic dependent launch, sm_90):
    it must then call `wait_for_previous()` of ptx.cuh before it reads or writes what others do.
    """

    kernel: Kernel
    grid: Dim3
    block: Dim3
    args: tuple[Buffer | int | float | np.int64 | None, ...]
    shared_bytes: int = 0  # dynamic shared memory, beside what the function declares
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class Gemm:
    """out = alpha * x @ w.T (+ out, with `accumulate`) by cuBLAS: operands of one type, float32 sums, rows of x contiguous.
    Float32 operands are multiplied as such, never as TF32. With `halves` the results are rounded to float16."""

    out: Buffer  # float32, or float16 with `halves`: [m, out_stride]
    x: Buffer  # [m, k]
    w: Buffer  # [n, w_stride]
    m: int
    n: int
    k: int
    out_stride: int  # in elements; at least n
    accumulate: bool = False
    alpha: float = 1.0
    kind: GemmType = "f16"
    w_stride: int = 0  # in elements; 0: k
    halves: bool = False


@dataclass(frozen=True, slots=True)
class Reduce:
    """data = the sum of the ranks' data, float32 [n], in place, by NCCL. Every rank comes to the same ones in the same order."""

    data: Buffer
    n: int


Step = Launch | Gemm | Reduce
