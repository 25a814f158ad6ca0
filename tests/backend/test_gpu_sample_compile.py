"""The kernels of sampling, compiled by NVRTC for three architectures: registers, spills and shared memory of a block."""

from __future__ import annotations

import pytest

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu.kernel_cache import unit_of, unit_text
from pyinfer.kernels_gpu.launch import Kernel
from pyinfer.kernels_gpu.nvrtc import NVRTC, load_nvrtc, read_resources

pytestmark = pytest.mark.backend
FEW_SPILLS = 64  # bytes, as ptxas may put by outside of loops
THREADS = {
    "sample.cu": {"sample_rows": 1024, "row_logprobs": 1024},
    "sample_steps.cu": {"draw_numbers": 128, "advance_step": 128, "name_tokens": 128},
}


@pytest.fixture(scope="module")
def nvrtc() -> NVRTC:
    try:
        return load_nvrtc()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", [75, 80, 90])
@pytest.mark.parametrize("source", THREADS)
def test_sampling_compiles(nvrtc: NVRTC, source: str, arch: int) -> None:
    text = unit_text(unit_of(Kernel(source, next(iter(THREADS[source])))))
    log = nvrtc.compile(text, source, arch, ("--ptxas-options=-v",)).log
    found = {each.name: each for each in read_resources(log)}
    assert found.keys() == THREADS[source].keys()
    for name, threads in THREADS[source].items():
        assert found[name].registers * threads <= 65536, found[name]
        assert found[name].spill_bytes <= FEW_SPILLS and found[name].shared_bytes <= 48 << 10, found[name]
