"""NVRTC over ctypes: CUDA source text to machine code, without CuPy and without a GPU.

https://docs.nvidia.com/cuda/nvrtc. The library and the headers (cuda_fp16.h) are taken from NVIDIA's wheels, then from a
CUDA toolkit (`toolkit`).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyinfer.errors import BackendError
from pyinfer.kernels_gpu.toolkit import driver_major, find_headers, find_libraries, has_newer, install, major_of

_HEADER = "cuda_fp16.h"
FLAGS = ("--std=c++17", "--device-as-default-execution-space")  # the latter for constexpr functions


@dataclass(frozen=True, slots=True)
class Binary:
    """What the driver loads: machine code of one architecture, or PTX for a GPU newer than this NVRTC."""

    code: bytes
    log: str  # warnings; with --ptxas-options=-v registers and spills of each kernel


class NVRTC:
    """One loaded library. Calls may come from several threads."""

    def __init__(self, library: ctypes.CDLL, include: Path) -> None:
        """`include` is the folder of the headers of the same CUDA."""
        self._library, self.include = library, include
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
    """The newest that the driver can use, with its headers; BackendError says what to install."""
    how, problem = install(driver_major()), "no NVRTC was found"
    if has_newer("nvrtc"):
        problem = f"the NVRTC that is here is newer than the driver, which serves CUDA {driver_major()}"
    for library in find_libraries("nvrtc"):
        major = major_of(library)
        try:
            loaded = _load(library)
        except OSError:
            continue
        include = find_headers(_HEADER, major, library)
        if include is not None:
            return NVRTC(loaded, include)
        problem = f"NVRTC {major} is here, but no CUDA {major} headers ({_HEADER}) are"
    raise BackendError(f"{problem}; {how}")


def _load(library: Path | str) -> ctypes.CDLL:
    """With its second library, which NVRTC 13.0 asks for by name only: it looks nowhere for it in particular."""
    if isinstance(library, Path):
        for builtins in sorted(library.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(library))


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
