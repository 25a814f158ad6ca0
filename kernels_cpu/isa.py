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
    dot: Literal["vpdpbusd", "vpmaddubsw", "sdot", "widen"]  # how four u8 x i8 products are added to an i32 lane
    half: bool  # the CPU converts float16 by itself
    cpu: str  # LLVM's target CPU and features
    features: str
    prefetch: int = 0  # bytes ahead that weights are asked for; 0 leaves it to the hardware
    bfloat: bool = False  # the CPU has dot products of bfloat16 pairs


_AVX2 = ("avx2", "fma", "f16c")
_AVX512_VNNI = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
# name, lanes, dot, float16, and the feature sets of which one is needed; best first
_KINDS: tuple[
    tuple[str, int, Literal["vpdpbusd", "vpmaddubsw", "sdot", "widen"], bool, tuple[tuple[str, ...], ...]], ...
] = (
    ("avx512vnni", 16, "vpdpbusd", True, (_AVX512_VNNI,)),
    ("avxvnni", 8, "vpdpbusd", True, ((*_AVX2, "avxvnni"), (*_AVX2, *_AVX512_VNNI))),
    ("avx2", 8, "vpmaddubsw", True, (_AVX2,)),
    ("neon", 4, "sdot", True, (("neon", "dotprod"),)),
    ("portable", 4, "widen", False, ((),)),
)
# Measured: Zen 5 reads Q5_K and Q6_K 1.7 times faster with it (Q8_0 slower: see matmul_block), Zen 4 up to twice slower.
_PREFETCH = {"znver5": 4096}
_LLVM_WITH_BFLOAT = 16  # before it, the intrinsic of the dot product took other types


def _target() -> tuple[str, dict[str, bool], str]:
    """LLVM's name and features of the CPU to compile for: this one, or what Numba's own variables say."""
    import llvmlite.binding as llvm

    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    if "NUMBA_CPU_FEATURES" in os.environ:
        text = os.environ["NUMBA_CPU_FEATURES"]
        return name, {word[1:]: word[0] == "+" for word in text.split(",") if word}, text
    features = llvm.get_host_cpu_features()
    return name, dict(features), features.flatten()


def available() -> tuple[str, ...]:
    """The ISA names this machine can run, best first."""
    _, has, _ = _target()
    return tuple(kind[0] for kind in _KINDS if any(all(has.get(f, False) for f in need) for need in kind[4]))


@lru_cache(maxsize=8)
def make_isa(name: str) -> ISA:
    """The ISA called `name`; ConfigError when it is unknown or this CPU lacks it."""
    names = [kind[0] for kind in _KINDS]
    if name not in names:
        raise ConfigError(f"PYINFER_ISA={name!r} is not one of {', '.join(names)}")
    if name not in available():
        raise ConfigError(
            f"PYINFER_ISA={name!r} needs instructions this CPU lacks; it can run {', '.join(available())}"
        )
    cpu, has, features = _target()
    _, lanes, dot, half, _ = _KINDS[names.index(name)]
    if name == "portable" and "sse2" in has:  # not leaning on what this host happens to have: it is for the oldest ones
        cpu, features = "x86-64", "+sse2"
    bfloat = lanes == 16 and has.get("avx512bf16", False) and _llvm_version() >= _LLVM_WITH_BFLOAT
    prefetch = 0 if name == "portable" else _PREFETCH.get(_host_name(), 0)
    return ISA(name, lanes, dot, half, cpu, features, prefetch, bfloat)


def _host_name() -> str:
    """LLVM's name of this CPU, whatever the code is compiled for: how it prefetches does not depend on that."""
    import llvmlite.binding as llvm

    return str(llvm.get_host_cpu_name())


def _llvm_version() -> int:
    import llvmlite.binding as llvm

    return int(llvm.llvm_version_info[0])


def current_isa() -> ISA:
    """The best ISA of this CPU, or the one PYINFER_ISA names."""
    return make_isa(os.environ.get("PYINFER_ISA") or available()[0])
