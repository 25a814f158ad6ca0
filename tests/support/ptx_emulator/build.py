"""Kernel to PTX by NVRTC, PTX to C++, C++ to a shared object by g++; each step is kept by a hash of all that goes in."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from cuda_emulator.build import FLAGS, compile_library, host_flags, runtime

from ptx_emulator.parse import Module, parse
from ptx_emulator.translate import translate
from pyinfer.kernels_gpu.kernel_cache import Unit, unit_of, unit_text
from pyinfer.kernels_gpu.launch import Kernel
from pyinfer.kernels_gpu.nvrtc import load_nvrtc
from pyinfer.paths import home

HERE = Path(__file__).parent
CACHE = home() / "tests" / "ptx_emulator"  # read once: tests that move PYINFER_HOME share it
ARCHS = (75, 80, 90)


@lru_cache(maxsize=1)
def _base_hash() -> str:
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(" ".join((version, *FLAGS, *host_flags())).encode())
    for path in sorted([*HERE.glob("ptx_*.h"), HERE / "trace.h", HERE.parent / "cuda_emulator" / "runtime.h"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:24]


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


@lru_cache(maxsize=64)
def ptx_of(unit: Unit, arch: int = 90) -> str:
    """What NVRTC makes of a unit for the newest of `ARCHS` that is not newer than `arch`, with the lines of the source.

    A unit of a `.ptx` file is what it says.
    """
    if unit[0].endswith(".ptx"):
        return Path(unit[0]).read_text()
    target = max(known for known in ARCHS if known <= arch)
    text, nvrtc = unit_text(unit), load_nvrtc()
    path = CACHE / f"{Path(unit[0]).stem}-{target}-{_key(text, nvrtc.version)}.ptx"
    if not path.exists():
        # an architecture that NVRTC does not have gets the PTX of the one before it
        _replace(path, nvrtc.compile(text, unit[0], target + 1, ("-lineinfo",)).code.rstrip(b"\0"))
    return path.read_text()


@lru_cache(maxsize=64)
def module_of(unit: Unit, arch: int = 90) -> Module:
    return parse(ptx_of(unit, arch))


def place_of(kernel: Kernel, arch: int, line: int) -> str:
    """A line of a kernel's PTX for people: the source it came from and the instruction."""
    text = ptx_of(unit_of(kernel), arch).split("\n")
    file, number = module_of(unit_of(kernel), arch).places.get(line, ("?", 0))
    return f"{file}:{number}, line {line} of the PTX: {text[line - 1].strip()}" if 0 < line <= len(text) else "?"


def _compile(name: str, source: str, options: Sequence[str], sources: Sequence[Path] = ()) -> Path:
    path = CACHE / f"{_key(_base_hash(), source, options, *(s.read_bytes() for s in sources))}.so"
    return compile_library(path, f"the PTX of {name}", source, (*options, f"-I{HERE}"))


class PTXKernel:
    """A loaded kernel: where to call it and what its arguments are, one letter each (q 64 bits, i 32 bits, f float)."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.emulator_signature.restype = ctypes.c_char_p
        self.signature: str = library.emulator_signature().decode()
        self.static_shared: int = library.emulator_static_shared()
        self.max_threads: int = library.ptx_max_threads()
        self.call = ctypes.cast(library.emulator_call, ctypes.c_void_p)
        self.poison = ctypes.cast(library.emulator_poison, ctypes.c_void_p)
        library.ptx_launch.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint, *[ctypes.c_int] * 3
        ]  # fmt: skip
        library.ptx_launch.restype = None
        library.ptx_site.restype = ctypes.c_uint32
        self.begin, self.finish, self.site = library.ptx_launch, library.ptx_finish, library.ptx_site
        self.has_waited, self.opens_late = library.ptx_has_waited, library.ptx_opens_late


def _kernel_path(kernel: Kernel, arch: int, trace: bool) -> Path:
    source = translate(module_of(unit_of(kernel), arch), kernel.name)
    return _compile(str(kernel), source, ("-DPTX_TRACE",) if trace else ())


@lru_cache(maxsize=1)
def trace_library() -> ctypes.CDLL:
    """`trace.cpp`, which kernels with trace calls need."""
    sources = [HERE / "trace.cpp", *sorted(HERE.glob("trace*.h"))]
    path = _compile("trace.cpp", '#include "trace.cpp"\n', ("-O2",), sources)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@lru_cache(maxsize=8192)
def compiled(kernel: Kernel, arch: int = 90, trace: bool = False) -> PTXKernel:
    runtime()
    if trace:
        trace_library()
    return PTXKernel(_kernel_path(kernel, arch, trace))


def compile_all(kernels: Sequence[Kernel], arch: int = 90, trace: bool = False) -> None:
    """Compile what is not cached, on as many cores as there are."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: _kernel_path(kernel, arch, trace), kernels))
