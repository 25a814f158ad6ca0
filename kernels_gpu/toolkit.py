"""Where NVIDIA's libraries and headers lie, and which of them the driver can use. It needs neither CuPy nor a GPU.

What CUDA 12 made runs on drivers of CUDA 12 and later, what CUDA 13 made on those of CUDA 13 and later, whatever the minor
versions (https://docs.nvidia.com/deploy/cuda-compatibility): so the newest major version that the driver serves is taken.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from pyinfer.kernels_gpu.driver import DriverError, load_driver

MAJORS = (13, 12)  # of CUDA, that the kernels were compiled with
_MAJOR_OF_FILE = re.compile(r"(?:\.so\.|64_)(\d\d)")  # libnvrtc.so.13, nvrtc64_130_0.dll, cublas64_13.dll
_VERSION = re.compile(r"^#define\s+CUDART_VERSION\s+(\d+)", re.MULTILINE)


@lru_cache(maxsize=1)
def driver_major() -> int | None:
    """The newest major version of CUDA that the driver serves; None where there is none that says so."""
    driver = load_driver()
    try:
        return (driver.version() // 1000 or None) if driver else None
    except DriverError:
        return None


def install(cuda_major: int | None) -> str:
    """What brings CuPy and all libraries that the backend calls, for a driver of this version."""
    return f"pip install 'pyinfer-gguf[{'gpu' if (cuda_major or 12) < 13 else 'gpu13'}]'"


def find_libraries(name: str) -> list[Path | str]:
    """Files of NVIDIA's library `name` (nvrtc, cublas) that the driver can use: the newest CUDA first, and of one CUDA wheels,
    then toolkits, then what the system finds by name."""
    found = [(major_of(path), place, path) for place, path in enumerate(_files(name))]
    most = driver_major()
    usable = [each for each in found if each[0] >= min(MAJORS) and (most is None or each[0] <= most)]
    return [path for _, _, path in sorted(usable, key=lambda each: (-each[0], each[1]))]


def has_newer(name: str) -> bool:
    """Whether there is one that only a newer driver could use."""
    most = driver_major()
    return most is not None and any(isinstance(path, Path) and major_of(path) > most for path in _files(name))


def find_headers(header: str, major: int, library: Path | str) -> Path | None:
    """The folder with this header of CUDA `major`; that beside the library before others."""
    folders = [path / "include" for path in (*package_folders(), *toolkit_folders())]
    if isinstance(library, Path):
        folders.insert(0, library.parent.parent / "include")
    for folder in (*folders, Path("/usr/include")):
        if (folder / header).is_file() and _version_of(folder) in (major, None):
            return folder
    return None


def package_folders() -> Iterator[Path]:
    """Where NVIDIA's wheels lie: site-packages/nvidia/cuda_nvrtc (CUDA 12), site-packages/nvidia/cu13."""
    found = importlib.util.find_spec("nvidia")
    for root in (found.submodule_search_locations or []) if found else []:
        yield from sorted(path for path in Path(root).iterdir() if path.is_dir())


def toolkit_folders() -> Iterator[Path]:
    """Where CUDA toolkits lie."""
    for name in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    yield Path("/usr/local/cuda")


def _files(name: str) -> Iterator[Path | str]:
    if sys.platform == "win32":
        for folder in (*package_folders(), *toolkit_folders()):
            yield from sorted(path for path in (folder / "bin").rglob(f"{name}64_*.dll") if ".alt." not in path.name)
        return
    for folder in package_folders():
        yield from sorted((folder / "lib").glob(f"lib{name}.so.*"))
    for folder in toolkit_folders():
        yield from sorted((folder / "lib64").glob(f"lib{name}.so.*"))
    yield from (f"lib{name}.so.{major}" for major in MAJORS)


def major_of(path: Path | str) -> int:
    """The major version of CUDA that a library is of, by its name; 0 if that does not say."""
    found = _MAJOR_OF_FILE.search(Path(path).name)
    return int(found[1]) if found else 0


@lru_cache(maxsize=8)
def _version_of(include: Path) -> int | None:
    """The major version of CUDA that these headers are of."""
    try:
        found = _VERSION.search((include / "cuda_runtime_api.h").read_text("utf-8", "replace"))
    except OSError:
        return None
    return int(found[1]) // 1000 if found else None
