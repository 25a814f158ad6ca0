"""NVRTC without CuPy and without a GPU: what it compiles, how it fails, and the cache of what it made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu.kernel_cache import KernelCache, unit_text
from pyinfer.kernels_gpu.launch import Kernel
from pyinfer.kernels_gpu.nvrtc import NVRTC, load_nvrtc, read_resources

pytestmark = pytest.mark.backend

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x) {
  float v[200];
  for (int i = 0; i < 200; i++) v[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < 3; k++)
    for (int i = 0; i < 200; i++) v[i] = v[i] * v[(i * 7 + k) % 200];
  for (int i = 0; i < 200; i++) x[i * 1024 + threadIdx.x] = v[i];
}
extern "C" __global__ void plain(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[63 - threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def nvrtc() -> NVRTC:
    try:
        return load_nvrtc()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_machine_code_and_what_it_takes(nvrtc: NVRTC, arch: int) -> None:
    binary = nvrtc.compile(SPILLING, "test.cu", arch, ("--ptxas-options=-v",))
    assert binary.code[:4] == b"\x7fELF"
    spilling, plain = sorted(read_resources(binary.log), key=lambda resources: resources.name, reverse=True)
    assert spilling.name == "spilling" and spilling.registers >= 32
    assert spilling.spill_bytes + spilling.stack_bytes > 0
    assert plain.name == "plain" and plain.registers < 32 and plain.spill_bytes == 0 and plain.shared_bytes == 256


def test_a_gpu_newer_than_nvrtc_gets_ptx(nvrtc: NVRTC) -> None:
    code = nvrtc.compile(SPILLING, "test.cu", max(nvrtc.archs) + 7).code
    assert f".target sm_{max(nvrtc.archs)}".encode() in code


def test_a_gpu_older_than_nvrtc_is_refused(nvrtc: NVRTC) -> None:
    with pytest.raises(BackendError, match=r"compute capability 2\.0"):
        nvrtc.compile(SPILLING, "test.cu", 20)


def test_errors_name_file_and_line(nvrtc: NVRTC) -> None:
    with pytest.raises(BackendError, match=r"test\.cu\(2\): error"):
        nvrtc.compile("\nint broken = nothing;", "test.cu", 80)


def test_the_cache_compiles_once(nvrtc: NVRTC, tmp_path: Path) -> None:
    source = tmp_path / "k.cu"
    source.write_text('#include "ptx.cuh"\nextern "C" __global__ void k(int* x) { x[0] = N; }\n')
    unit = (str(source), (("N", 3),))
    assert unit_text(unit).startswith("#define N 3\n")
    compiled: list[str] = []

    def cache() -> KernelCache:
        cache = KernelCache(80, tmp_path / "cache")
        cache.on_compile = lambda name, _share: compiled.append(name)
        return cache

    code = cache().binary(unit)
    assert cache().binary(unit) == code and compiled == ["k"]
    cache().prepare([unit, (str(source), (("N", 4),)), unit])
    assert compiled == ["k", "k"]
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert cache().binary(unit) == code and compiled == ["k"] * 3


def test_a_cache_that_cannot_be_written_costs_only_time(nvrtc: NVRTC, tmp_path: Path) -> None:
    source, blocked = tmp_path / "k.cu", tmp_path / "file"
    source.write_text('extern "C" __global__ void k(int* x) { x[0] = 1; }\n')
    blocked.write_text("")
    assert KernelCache(80, blocked / "cache").binary((str(source), ()))[:4] == b"\x7fELF"


def test_kernels_print_as_one_line() -> None:
    assert str(Kernel("a.cu", "k", (("N", 3), ("T", "Q4_K")))) == "a.cu:k N=3 T=Q4_K"
