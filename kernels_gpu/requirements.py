"""What the GPU backend needs on a machine, checked in order: each thing that can be missing has one line that says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from pyinfer.errors import BackendError
from pyinfer.graph.backend import DeviceInfo
from pyinfer.kernels_gpu.driver import NO_DEVICE, Driver, DriverError, load_driver
from pyinfer.kernels_gpu.toolkit import MAJORS, install

MIN_ARCH = 75  # Turing: the first with int8 products in tensor cores
_DRIVERS = {12: "525.60", 13: "580.65"}  # the first of each CUDA; what later minor versions made runs on it
_WITHOUT = "or use -ngl 0"


class NoGPUError(BackendError):
    """`has_device`: there is a GPU, and only software is missing."""

    def __init__(self, message: str, *, has_device: bool) -> None:
        super().__init__(f"no GPU can be used: {message}", param="n_gpu_layers")
        self.has_device = has_device


def usable_gpus(
    find_driver: Callable[[], Driver | None] = load_driver, installed: Sequence[str] | None = None
) -> list[DeviceInfo]:
    """The GPUs that the backend can run on; `NoGPUError` says what is missing. Imports no CuPy.

    `installed` are names of distributions; None: those of this Python.
    """
    devices, version = _devices(find_driver())
    usable = [device for device in devices if device.arch >= MIN_ARCH]
    if not usable:
        worst = devices[0]
        raise NoGPUError(
            f"{worst.name} has compute capability {worst.arch / 10:.1f}, and the kernels need {MIN_ARCH / 10:.1f} or "
            f"higher; use -ngl 0",
            has_device=False,
        )
    _check_cupy(_installed() if installed is None else installed, version)
    return usable


def _devices(driver: Driver | None) -> tuple[Sequence[DeviceInfo], int]:
    """All, and the newest CUDA that the driver serves."""
    if driver is None:
        raise NoGPUError(f"no NVIDIA driver is installed; install one, {_WITHOUT}", has_device=False)
    try:
        version = driver.version()
        least = min(MAJORS)
        if version < 1000 * least:
            raise NoGPUError(
                f"the NVIDIA driver is too old: it serves CUDA {_dotted(version)}, and {least}.0 is needed; "
                f"update it to {_DRIVERS[least]} or newer, {_WITHOUT}",
                has_device=True,
            )
        return driver.devices(), version
    except DriverError as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if error.code == NO_DEVICE and visible is not None:
            raise NoGPUError(
                f"CUDA_VISIBLE_DEVICES is {visible!r}, which leaves no GPU; change it, {_WITHOUT}", has_device=False
            ) from None
        if error.code == NO_DEVICE:
            raise NoGPUError("the NVIDIA driver sees no GPU; use -ngl 0", has_device=False) from None
        raise NoGPUError(f"the NVIDIA driver does not work: {error}; mend it, {_WITHOUT}", has_device=True) from None


def _check_cupy(installed: Sequence[str], version: int) -> None:
    """That exactly one CuPy is installed, and that the driver is new enough for it."""
    how = install(version // 1000)
    names = {name.lower().replace("_", "-") for name in installed}
    found = sorted(name for name in names if name == "cupy" or name.startswith("cupy-cuda"))
    if not found:
        raise NoGPUError(f"CuPy is not installed; {how}, {_WITHOUT}", has_device=True)
    if len(found) > 1:
        raise NoGPUError(
            f"{' and '.join(found)} are installed beside each other, which breaks CuPy; pip uninstall all but one",
            has_device=True,
        )
    number = found[0].removeprefix("cupy-cuda").removesuffix("x")
    major = int(number) if number.isdecimal() else min(MAJORS)
    if major < min(MAJORS):
        raise NoGPUError(
            f"{found[0]} is for a CUDA older than {min(MAJORS)}, the first that will do; pip uninstall {found[0]}, then {how}",
            has_device=True,
        )
    if version < 1000 * major:
        raise NoGPUError(
            f"{found[0]} needs a driver of CUDA {major}.0 ({_DRIVERS.get(major, 'a newer one')} or newer), and this one serves "
            f"{_dotted(version)}; update it, or pip uninstall {found[0]}, then {how}",
            has_device=True,
        )


def _installed() -> list[str]:
    from importlib.metadata import distributions  # slow to import, and only wanted where there is a GPU

    return [name for each in distributions() if (name := each.metadata["Name"])]


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
