"""Each way in which a GPU can be missing has its own line, and none of them imports CuPy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from pyinfer.errors import BackendError
from pyinfer.graph.backend import DeviceInfo
from pyinfer.kernels_gpu.driver import NO_DEVICE, DriverError
from pyinfer.kernels_gpu.requirements import NoGPUError, usable_gpus

pytestmark = pytest.mark.unit
GIB = 1 << 30
CUPY = ["numpy", "cupy_cuda12x"]


def gpu(arch: int, index: int = 0) -> DeviceInfo:
    return DeviceInfo(index, f"GPU of {arch}", arch, 70 * GIB, 80 * GIB)


class FakeDriver:
    def __init__(self, *devices: DeviceInfo, version: int = 12040, error: DriverError | None = None) -> None:
        self._devices, self._version, self._error = devices, version, error

    def version(self) -> int:
        return self._version

    def devices(self) -> Sequence[DeviceInfo]:
        if self._error is not None:
            raise self._error
        return self._devices


@pytest.mark.parametrize(
    "driver, installed, has_device, words",
    [
        (None, CUPY, False, "no NVIDIA driver is installed"),
        (FakeDriver(gpu(90), version=11080), CUPY, True, "too old.* CUDA 11.8, and 12.0 is needed.* 525"),
        (FakeDriver(error=DriverError("cuInit", NO_DEVICE, "no CUDA-capable device")), CUPY, False, "sees no GPU"),
        (FakeDriver(error=DriverError("cuInit", 803, "system has unsupported display driver")), CUPY, True,
         "does not work: cuInit says: system has unsupported"),
        (FakeDriver(gpu(61)), CUPY, False, "GPU of 61 has compute capability 6.1.* 7.5"),
        (FakeDriver(gpu(90)), ["numpy"], True, r"CuPy is not installed; pip install 'pyinfer-gguf\[gpu\]'"),
        (FakeDriver(gpu(90)), ["cupy-cuda11x"], True, "cupy-cuda11x is for a CUDA older than 12.*pip uninstall cupy-cuda11x"),
        (FakeDriver(gpu(90), version=12080), ["cupy-cuda13x"], True,
         r"cupy-cuda13x needs a driver of CUDA 13.0 \(580.65 or newer\), and this one serves 12.8; .*uninstall.*gguf\[gpu\]'"),
        (FakeDriver(gpu(90), version=13000), ["numpy"], True, r"CuPy is not installed; pip install 'pyinfer-gguf\[gpu13\]'"),
        (FakeDriver(gpu(90)), ["cupy-cuda11x", "cupy-cuda12x"], True, "cupy-cuda11x and cupy-cuda12x .*uninstall"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    driver: FakeDriver | None, installed: list[str], has_device: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(NoGPUError, match=f"(?s)^no GPU can be used: .*{words}") as caught:
        usable_gpus(lambda: driver, installed)
    assert isinstance(caught.value, BackendError) and "\n" not in str(caught.value)
    assert caught.value.has_device is has_device


def test_a_hidden_gpu_is_told_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    driver = FakeDriver(error=DriverError("cuInit", NO_DEVICE, "no CUDA-capable device"))
    with pytest.raises(NoGPUError, match="CUDA_VISIBLE_DEVICES is ''"):
        usable_gpus(lambda: driver, CUPY)


def test_usable_gpus_keep_their_numbers() -> None:
    devices = usable_gpus(lambda: FakeDriver(gpu(61, 0), gpu(75, 1), gpu(90, 2)), CUPY)
    assert [device.index for device in devices] == [1, 2]


@pytest.mark.parametrize(
    "version, cupy", [(12000, "cupy-cuda12x"), (13000, "cupy-cuda12x"), (13000, "cupy-cuda13x"), (13010, "cupy")]
)
def test_a_driver_serves_its_own_cuda_and_older_ones(version: int, cupy: str) -> None:
    assert usable_gpus(lambda: FakeDriver(gpu(90), version=version), [cupy, "cupyx-other"])


def test_no_path_to_a_model_imports_cupy() -> None:
    """Neither `-ngl auto` nor doctor: CuPy may be broken, and takes seconds."""
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "from pyinfer.runtime import loader, placement, llm; from pyinfer.cli import doctor, serve, bench\n"
        "from pyinfer.runtime.load_options import LoadOptions\n"
        "placement.find_devices(LoadOptions(n_gpu_layers='auto'))\n"
        "assert sys.modules['cupy'] is None and 'pyinfer.kernels_gpu.cupy_device' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_cupy_that_cannot_be_imported_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyinfer.kernels_gpu import backend

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "pyinfer.kernels_gpu.cupy_device", raising=False)
    monkeypatch.setattr(backend, "usable_gpus", lambda: [gpu(90)])
    with pytest.raises(BackendError, match=r"CuPy cannot be imported .*pip install") as caught:
        backend.GPUBackend().open_stage(None, None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
