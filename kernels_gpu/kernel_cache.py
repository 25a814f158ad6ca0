"""Machine code of kernels, compiled once for each architecture and kept on disk.

The key is a hash of the whole source text with its headers, the defines, the flags and NVRTC's version: an edited kernel
never meets its old code. A file holds the sha256 of its content, so half of one is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyinfer.kernels_gpu.launch import Defines, Kernel
from pyinfer.kernels_gpu.nvrtc import FLAGS, NVRTC, load_nvrtc
from pyinfer.kernels_gpu.sources import with_includes
from pyinfer.paths import kernels_dir

Unit = tuple[str, Defines]  # a source file with its defines: the kernels in it are compiled together


def unit_of(kernel: Kernel) -> Unit:
    return kernel.source, kernel.defines


class KernelCache:
    """Compiles units for one architecture.

    `on_compile` is told, by the calling thread, the name of what was not in a file, and the share done.
    """

    def __init__(self, arch: int, folder: Path | None = None, find_nvrtc: Callable[[], NVRTC] = load_nvrtc) -> None:
        self.arch = arch
        self.on_compile: Callable[[str, float], None] | None = None
        self._folder = folder
        self._find_nvrtc = find_nvrtc
        self._binaries: dict[Unit, bytes] = {}

    def binary(self, unit: Unit) -> bytes:
        """What `cuModuleLoadData` takes."""
        self.prepare([unit])
        return self._binaries[unit]

    def prepare(self, units: Iterable[Unit]) -> None:
        """Load what is in files and compile the rest, on several threads."""
        missing = []
        for unit in dict.fromkeys(units):
            if unit not in self._binaries:
                code = _read(self._path(unit))
                if code is None:
                    missing.append(unit)
                else:
                    self._binaries[unit] = code
        if not missing:
            return
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for done, (unit, code) in enumerate(zip(missing, pool.map(self._compile, missing), strict=True)):
                self._binaries[unit] = code
                if self.on_compile is not None:
                    self.on_compile(Path(unit[0]).stem, (done + 1) / len(missing))

    def _compile(self, unit: Unit) -> bytes:
        code = self._find_nvrtc().compile(unit_text(unit), unit[0], self.arch).code
        _write(self._path(unit), code)
        return code

    def _path(self, unit: Unit) -> Path:
        text = f"{self._find_nvrtc().version} {FLAGS} {self.arch} {unit_text(unit)}"
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return (self._folder or kernels_dir() / f"cuda-sm_{self.arch}") / f"{Path(unit[0]).stem}-{key}.bin"


def unit_text(unit: Unit) -> str:
    """The whole text that is compiled: defines, then the source with its headers."""
    source, defines = unit
    return "".join(f"#define {name} {value}\n" for name, value in defines) + with_includes(source)


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _write(path: Path, code: bytes) -> None:
    """A cache that cannot be written only costs the next start its time."""
    partial: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            partial = file.name
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(partial, path)
    except OSError:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
