"""g++ on `.cu` files: one shared object for each kernel, kept by a hash of everything that it is made of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from pyinfer.kernels_gpu.launch import Kernel
from pyinfer.kernels_gpu.sources import with_includes
from pyinfer.paths import home

HERE = Path(__file__).parent
CACHE = home() / "tests" / "cuda_emulator"  # read once: tests that move PYINFER_HOME share it
_CHECKS = "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero"
FLAGS = (
    "-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique",
    "-fno-weak", "-Wl,-Bsymbolic", "-U_FORTIFY_SOURCE", "-fno-stack-protector", "-fcf-protection=none",
)  # fmt: skip
NICE = ("nice", "-n", "15") if shutil.which("nice") else ()
has_compiler = shutil.which("g++") is not None


class EmulatorError(AssertionError):
    """A kernel that does not compile, or that did something that a GPU would not forgive."""


@lru_cache(maxsize=1)
def host_flags() -> tuple[str, ...]:
    """What makes float16 fast, where the CPU has it."""
    try:
        return ("-mf16c", "-mfma") if {"f16c", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()) else ()
    except OSError:
        return ()


@lru_cache(maxsize=1)
def _base_hash() -> str:
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(" ".join((version, *FLAGS, *host_flags(), _CHECKS)).encode())
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile(name: str, text: str, options: Sequence[str]) -> Path:
    key = hashlib.sha256(f"{_base_hash()}{text}{options}".encode()).hexdigest()[:24]
    return compile_library(CACHE / f"{key}.so", name, text, (*options, f"-I{HERE}"))


def compile_library(path: Path, name: str, text: str, options: Sequence[str]) -> Path:
    """The shared object of a source text at `path`, unless it is there; its name must say what it is made of."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, target = Path(folder) / "source.cpp", Path(folder) / "kernel.so"
        source.write_text(text)
        command = [*NICE, "g++", *FLAGS, *host_flags(), *options, "-o", str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EmulatorError(f"g++ cannot compile {name}:\n{done.stderr[:6000]}")
        os.replace(target, path)
    return path


@lru_cache(maxsize=1)
def runtime() -> ctypes.CDLL:
    """The fibers and barriers that all kernels share."""
    text = (HERE / "runtime.cpp").read_text()
    library = ctypes.CDLL(str(_compile("runtime.cpp", text, ())), mode=ctypes.RTLD_GLOBAL)
    library.emulator_alloc.restype = ctypes.c_void_p
    library.emulator_alloc.argtypes = [ctypes.c_size_t]
    library.emulator_free.argtypes = [ctypes.c_void_p]
    library.emulator_launch.restype = ctypes.c_char_p
    library.emulator_launch.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_size_t, ctypes.c_int]
    return library


class CompiledKernel:
    """A loaded kernel: where to call it and what its arguments are, one letter each (p, i, l, f)."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_signature.restype = ctypes.c_char_p
        self.signature: str = self._library.emulator_signature().decode()
        self.static_shared: int = self._library.emulator_static_shared()
        self.call = ctypes.cast(self._library.emulator_call, ctypes.c_void_p)
        self.poison = ctypes.cast(self._library.emulator_poison, ctypes.c_void_p)


def _kernel_path(kernel: Kernel) -> Path:
    text = with_includes(kernel.source)
    defines = "".join(f"#define {name} {value}\n" for name, value in kernel.defines)
    whole = f'{defines}#define PYINFER_EMULATE 1\n#define EMULATOR_KERNEL {kernel.name}\n{text}\n#include "entry.h"\n'
    return _compile(str(kernel), whole, (_CHECKS, "-fsanitize-undefined-trap-on-error"))


@lru_cache(maxsize=4096)
def compiled(kernel: Kernel) -> CompiledKernel:
    runtime()
    return CompiledKernel(_kernel_path(kernel))


def compile_all(kernels: Sequence[Kernel]) -> None:
    """Compile what is not cached, on as many cores as there are."""
    runtime()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_kernel_path, kernels))
