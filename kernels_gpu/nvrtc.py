"""NVRTC over ctypes: CUDA source text to machine code, without CuPy and without a GPU.

https://docs.nvidia.com/cuda/nvrtc. The library and the headers (cuda_fp16.h) are taken from NVIDIA's wheels, then from a
CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyinfer.errors import BackendError

_INSTALL = "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
_HEADER = "cuda_fp16.h"
FLAGS = ("--std=c++17", "--device-as-default-execution-space")  # the latter for constexpr functions


@dataclass(frozen=True, slots=True)
class Binary:
    """What the driver loads: machine code of one architecture, or PTX for a GPU newer than this NVRTC."""

    code: bytes
    log: str  # warnings; with --ptxas-options=-v registers and spills of each kernel


class NVRTC:
    """One loaded library. Calls may come from several threads."""

    def __init__(self, library: Path | str, include: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.include = include
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)
        self.archs = self._supported_archs()

    def compile(self, text: str, name: str, arch: int, options: Sequence[str] = ()) -> Binary:
        """Compile for compute capability `arch` / 10; BackendError with the compiler's message if it does not compile."""
        targets = [known for known in self.archs if known <= arch]
        if not targets:
            raise BackendError(f"NVRTC {self.dotted_version} knows no GPU as old as compute capability {arch / 10:.1f}")
        exact = arch in targets
        target = f"sm_{arch}" if exact else f"compute_{targets[-1]}"
        flags = (*FLAGS, f"--gpu-architecture={target}", f"--include-path={self.include}", *options)
        program = ctypes.c_void_p()
        self._check(
            self._library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None),
            "nvrtcCreateProgram",
        )
        try:
            raw = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            failed = self._library.nvrtcCompileProgram(program, len(flags), raw)
            log = self._fetch(program, "ProgramLog").rstrip(b"\0").decode("utf-8", "replace")
            if failed:
                raise BackendError(
                    f"NVRTC {self.dotted_version} cannot compile {name} for {target}: {log.strip()[:4000]}"
                )
            return Binary(self._fetch(program, "CUBIN" if exact else "PTX"), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    @property
    def dotted_version(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"

    def _supported_archs(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        archs = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(archs), "nvrtcGetSupportedArchs")
        return tuple(sorted(archs))

    def _fetch(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data), f"nvrtcGet{what}")
        return data.raw

    def _check(self, code: int, call: str) -> None:
        if code:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise BackendError(f"{call} says: {self._library.nvrtcGetErrorString(code).decode()}")


@lru_cache(maxsize=1)
def load_nvrtc() -> NVRTC:
    """NVRTC 12 or later with its headers; BackendError says what to install."""
    include = next((folder for folder in _include_folders() if (folder / _HEADER).is_file()), None)
    problem = "no NVRTC was found"
    for library in _libraries():
        try:
            if include is None:
                raise BackendError(f"NVRTC is here, but no CUDA headers ({_HEADER}) are; {_INSTALL}")
            nvrtc = NVRTC(library, include)
        except OSError:
            continue
        if nvrtc.version[0] >= 12:
            return nvrtc
        problem = f"NVRTC {nvrtc.dotted_version} is too old; 12.0 is the oldest that will do"
    raise BackendError(f"{problem}; {_INSTALL}")


def package_folders() -> Iterator[Path]:
    """Where NVIDIA's wheels lie: site-packages/nvidia/cuda_nvrtc (CUDA 12), site-packages/nvidia/cu13."""
    found = importlib.util.find_spec("nvidia")
    for root in (found.submodule_search_locations or []) if found else []:
        folders = [path for path in Path(root).iterdir() if path.is_dir()]
        # the first must be of the CUDA that the pyproject's wheels are of
        yield from sorted(folders, key=lambda path: (not path.name.startswith("cuda_"), path.name))


def toolkit_folders() -> Iterator[Path]:
    """Where CUDA toolkits lie."""
    for name in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    yield Path("/usr/local/cuda")


def _include_folders() -> Iterator[Path]:
    for folder in (*package_folders(), *toolkit_folders()):
        yield folder / "include"
    yield Path("/usr/include")


def _libraries() -> Iterator[Path | str]:
    for folder in package_folders():
        yield from sorted((folder / "lib").glob("libnvrtc.so.*"))
        yield from sorted((folder / "bin").rglob("nvrtc64_*_0.dll"))
    for folder in toolkit_folders():
        yield from sorted((folder / "lib64").glob("libnvrtc.so.*"))
    yield from ("libnvrtc.so.12", "libnvrtc.so")


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas says about one kernel."""

    name: str
    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    shared_bytes: int  # static


_FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def read_resources(log: str) -> list[Resources]:
    """Of every kernel in the log of a compilation with `--ptxas-options=-v`."""
    found = []
    for match in _FUNCTION.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spills = int(match["stores"]) + int(match["loads"])
        found.append(
            Resources(
                match["name"], int(match["registers"]), spills, int(match["stack"]), int(shared[1]) if shared else 0
            )
        )
    return found
