"""Numbers and structures that are written here in Python, against NVIDIA's own headers, of the wheels that are installed."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_cuda import FakeCUDA, fake_cuda

from pyinfer.kernels_gpu import cublas, cuda_launch, driver, side_copies
from pyinfer.kernels_gpu.toolkit import package_folders, toolkit_folders

pytestmark = pytest.mark.backend

INCLUDES = [folder / "include" for folder in (*package_folders(), *toolkit_folders()) if (folder / "include").is_dir()]
LAYOUT = """
#include <cuda.h>
#include <cstddef>
#include <cstdio>
#define NAME(x) #x
#define SYMBOL(x) std::puts(NAME(x))
int main() {
  std::printf("%zu %zu %zu\\n", sizeof(CUlaunchAttribute), offsetof(CUlaunchAttribute, id), offsetof(CUlaunchAttribute, value));
  std::printf("%zu %zu %zu %zu %zu %zu %zu\\n", sizeof(CUlaunchConfig), offsetof(CUlaunchConfig, gridDimX),
              offsetof(CUlaunchConfig, blockDimX), offsetof(CUlaunchConfig, sharedMemBytes), offsetof(CUlaunchConfig, hStream),
              offsetof(CUlaunchConfig, attrs), offsetof(CUlaunchConfig, numAttrs));
  SYMBOL(cuMemGetInfo); SYMBOL(cuCtxPushCurrent); SYMBOL(cuCtxPopCurrent); SYMBOL(cuDevicePrimaryCtxRelease);
  SYMBOL(cuDevicePrimaryCtxRetain); SYMBOL(cuDeviceGetName); SYMBOL(cuLaunchKernelEx); SYMBOL(cuGetErrorString);
}
"""


def headers(name: str) -> list[Path]:
    found = [folder / name for folder in INCLUDES if (folder / name).is_file()]
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def value_of(header: Path, name: str) -> int:
    """Of an enumerator or a macro."""
    found = re.search(rf"^[#\s,]*(?:define\s+)?{name}\s*(?:=|\s)\s*(-?\w+)", header.read_text("utf-8", "replace"), re.M)
    assert found, f"{header} has no {name}"
    return int(found[1], 0)


@pytest.mark.parametrize(
    "header, name, ours",
    [
        ("cuda.h", "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION", cuda_launch.OVERLAP),
        ("cuda.h", "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", cuda_launch.DYNAMIC_SHARED),
        ("cuda.h", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", driver.CAPABILITY[0]),
        ("cuda.h", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR", driver.CAPABILITY[1]),
        ("cuda.h", "CUDA_ERROR_NO_DEVICE", driver.NO_DEVICE),
        ("driver_types.h", "cudaHostRegisterPortable", side_copies.PORTABLE),
        ("driver_types.h", "cudaHostRegisterReadOnly", side_copies.READ_ONLY),
        ("library_types.h", "CUDA_R_16F", cublas.R_16F),
        ("library_types.h", "CUDA_R_32F", cublas.R_32F),
        ("cublas_api.h", "CUBLAS_OP_N", cublas.OP_N),
        ("cublas_api.h", "CUBLAS_OP_T", cublas.OP_T),
        ("cublas_api.h", "CUBLAS_GEMM_DEFAULT", cublas.DEFAULT_ALGORITHM),
        ("cublas_api.h", "CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION", cublas.SUMS_IN_FLOAT32),
        ("cublas_api.h", "CUBLAS_COMPUTE_32F", cublas.TYPES["f16"][1]),
        ("cublas_api.h", "CUBLAS_COMPUTE_32F_PEDANTIC", cublas.TYPES["f32"][1]),
    ],
)
def test_numbers(header: str, name: str, ours: int) -> None:
    for path in headers(header):
        assert value_of(path, name) == ours, path


def test_numbers_of_the_device() -> None:
    with fake_cuda(FakeCUDA()) as module:
        for path in headers("driver_types.h"):
            assert value_of(path, "cudaErrorMemoryAllocation") == module.OUT_OF_MEMORY


def test_structures_and_names_of_functions(tmp_path: Path) -> None:
    """As the C++ compiler lays them out; functions have names with a version behind macros."""
    paths, compiler = headers("cuda.h"), shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    (tmp_path / "layout.cpp").write_text(LAYOUT)
    for path in paths:
        program = tmp_path / "layout"
        subprocess.run([compiler, f"-I{path.parent}", tmp_path / "layout.cpp", "-o", program], check=True)
        attribute, config, *names = subprocess.run(
            [program], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        kind, other = cuda_launch.Attribute, cuda_launch.Config
        assert [ctypes.sizeof(kind), kind.id.offset, kind.value.offset] == list(map(int, attribute.split()))
        places = [
            getattr(other, name).offset
            for name in ("grid", "block", "shared_bytes", "stream", "attributes", "n_attributes")
        ]
        assert [ctypes.sizeof(other), *places] == list(map(int, config.split()))
        called = Path(driver.__file__).read_text() + Path(cuda_launch.__file__).read_text()
        for name in names:
            assert f'"{name}"' in called or f".{name}(" in called, f"{path} calls it {name}"
