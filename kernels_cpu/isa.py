"""Which vector instructions the kernels are emitted for, chosen from what LLVM says of this CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pyinfer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ISA:
    """One way to emit every kernel; all of them share the same weight layout."""

    name: str
    lanes: int  # 32-bit lanes of a vector
    dot: Literal["vpdpbusd", "vpmaddubsw", "widen"]  # how four u8 x i8 products are added to an i32 lane
    half: bool  # the CPU converts float16 by itself
    cpu: str  # LLVM's target CPU and features
    features: str
    prefetch: int = 0  # bytes ahead that weights are asked for; 0 leaves it to the hardware


# Measured: Zen 5 reads Q5_K and Q6_K 1.7 times faster with it, Zen 4 up to twice slower.
_PREFETCH = {"znver5": 4096}
_CHOICES = ("avx512vnni", "avxvnni", "avx2", "portable")


def _host() -> tuple[str, dict[str, bool], str]:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return llvm.get_host_cpu_name(), dict(features), features.flatten()


def available() -> tuple[str, ...]:
    """The ISA names this machine can run, best first."""
    _, has, _ = _host()

    def all_of(*names: str) -> bool:
        return all(has.get(name, False) for name in names)

    found = []
    if all_of("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"):
        found.append("avx512vnni")
    if all_of("avx2", "fma", "f16c") and (all_of("avxvnni") or all_of("avx512vl", "avx512vnni")):
        found.append("avxvnni")
    if all_of("avx2", "fma", "f16c"):
        found.append("avx2")
    return (*found, "portable")


@lru_cache(maxsize=8)
def make_isa(name: str) -> ISA:
    """The ISA called `name`; ConfigError when it is unknown or this CPU lacks it."""
    if name not in _CHOICES:
        raise ConfigError(f"PYINFER_ISA={name!r} is not one of {', '.join(_CHOICES)}")
    if name not in available():
        raise ConfigError(f"PYINFER_ISA={name!r} needs instructions this CPU lacks; it can run {', '.join(available())}")
    cpu, has, features = _host()
    if name == "avx512vnni":
        return ISA(name, 16, "vpdpbusd", True, cpu, features, _PREFETCH.get(cpu, 0))
    if name == "avxvnni":
        return ISA(name, 8, "vpdpbusd", True, cpu, features, _PREFETCH.get(cpu, 0))
    if name == "avx2":
        return ISA(name, 8, "vpmaddubsw", True, cpu, features, _PREFETCH.get(cpu, 0))
    # On x86 portable code must not lean on what the host happens to have: it is the path for the oldest machines.
    if "sse2" in has:
        return ISA(name, 4, "widen", False, "x86-64", "+sse2")
    return ISA(name, 4, "widen", False, cpu, features)


def current_isa() -> ISA:
    """The best ISA of this CPU, or the one PYINFER_ISA names."""
    return make_isa(os.environ.get("PYINFER_ISA") or available()[0])
