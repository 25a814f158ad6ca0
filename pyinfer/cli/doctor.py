"""`pyinfer doctor`: what this machine offers, and what pyinfer would use of it and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pyinfer
from pyinfer.cli.console import print_facts

_PACKAGES = ("numpy", "numba", "llvmlite", "gguf", "tokenizers", "jinja2", "fastapi", "uvicorn", "typer", "rich", "pip")
_GPU_PACKAGES = ("cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12", "nvidia-cublas-cu12")
Section = dict[str, Any]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    no_bandwidth: Annotated[bool, typer.Option("--no-bandwidth", help="Do not measure memory and arithmetic.")] = False,
) -> None:
    """Show the machine, the caches, and what would be used and why."""
    sections: dict[str, Section] = {
        "CPU": _cpu(),
        "Threads": _threads(),
        "Memory": _memory(measure=not no_bandwidth),
        **({} if no_bandwidth else {"Arithmetic": _peaks()}),
        "GPU": _gpu(),
        "Defaults": _defaults(),
        "Caches": _caches(),
        "Versions": _versions(),
    }
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    for title, facts in sections.items():
        print_facts(title, facts.items())


def _cpu() -> Section:
    from pyinfer.kernels_cpu import isa
    from pyinfer.runtime.cpu import cpu_name

    chosen, best = isa.current_isa(), isa.available()[0]
    forced = os.environ.get("PYINFER_ISA")
    reason = f"PYINFER_ISA is set; the best here is {best}" if forced else "the best that this CPU has and we emit"
    return {
        "model": cpu_name(),
        "compiles for": chosen.cpu,
        "kernels": f"{chosen.name}, {32 * chosen.lanes}-bit vectors ({reason})",
        "can run": ", ".join(isa.available()),
    }


def _threads() -> Section:
    from pyinfer.runtime.threads import cpu_limits

    limits = cpu_limits()
    reason = "physical cores that this process may use"
    if limits.quota is not None and limits.n_threads < limits.n_physical:
        reason = f"the control group grants {limits.quota:g} CPUs"
    return {
        "logical CPUs": limits.n_logical,
        "allowed": f"{limits.n_allowed} (affinity)",
        "physical cores": limits.n_physical,
        "quota": "none" if limits.quota is None else f"{limits.quota:g} CPUs",
        "default": f"{limits.n_threads} ({reason})",
    }


def _peaks() -> Section:
    """int8 and bf16 products a second, with one thread and with all."""
    from pyinfer.kernels_cpu.compiler import compiler_for
    from pyinfer.kernels_cpu.isa import current_isa
    from pyinfer.kernels_cpu.peak import PeakMeter
    from pyinfer.runtime.threads import default_threads

    facts: Section = {}
    for n in sorted({1, default_threads()}):
        meter = PeakMeter(compiler_for(current_isa()), n, samples=3)
        int8, bf16 = meter.product_rate("int8"), meter.product_rate("bf16")
        meter.close()
        threads = f"{n} thread{'s' if n > 1 else ''}"
        facts[f"int8, {threads}"] = f"{int8:.0f} GOP/s"
        facts[f"bf16, {threads}"] = "no instruction for it" if bf16 is None else f"{bf16:.0f} GFLOP/s"
    return facts


def _gpu() -> Section:
    from pyinfer.errors import BackendError
    from pyinfer.kernels_gpu.nvrtc import load_nvrtc
    from pyinfer.kernels_gpu.requirements import usable_gpus
    from pyinfer.runtime.sizes import format_binary

    try:
        devices = usable_gpus()
    except BackendError as error:
        return {"backend": f"{error}; all layers run on the CPU"}
    facts: Section = {
        f"GPU {each.index}": f"{each.name}, compute capability {each.arch / 10:.1f}, "
        f"{format_binary(each.free)} of {format_binary(each.total)} free"
        for each in devices
    }
    try:
        facts["compiler"] = f"NVRTC {load_nvrtc().dotted_version}"
    except BackendError as error:
        facts["compiler"] = str(error)
    facts["backend"] = "-ngl auto, the default, puts as many layers there as fit; all puts everything there"
    return facts


def _memory(*, measure: bool) -> Section:
    from pyinfer.runtime.bandwidth import read_bandwidth
    from pyinfer.runtime.memory import memory
    from pyinfer.runtime.sizes import format_binary
    from pyinfer.runtime.threads import default_threads

    now = memory()
    facts: Section = {"total": format_binary(now.total), "available": format_binary(now.available)}
    if measure:
        counts = sorted({1, 2, 4, 8, 16, 32, 64, default_threads()})
        for n in (n for n in counts if n <= default_threads()):
            facts[f"read, {n} thread{'s' if n > 1 else ''}"] = f"{read_bandwidth(n):.1f} GB/s"
    return facts


def _defaults() -> Section:
    from pyinfer.runtime.catalogue import CATALOGUE, DEFAULT_MODEL
    from pyinfer.runtime.memory import memory
    from pyinfer.runtime.model_store import find
    from pyinfer.runtime.sizes import format_binary, format_size

    stored = find(DEFAULT_MODEL)
    size = format_size(CATALOGUE[DEFAULT_MODEL].n_bytes)
    kv_memory = format_binary(min(4 << 30, memory().available // 2))
    return {
        "model": f"{DEFAULT_MODEL} ({'pulled' if stored else f'not pulled yet, {size}'})",
        "keys and values": f"up to {kv_memory} (4 GiB, or half of what is free after the weights)",
    }


def _caches() -> Section:
    from pyinfer import paths
    from pyinfer.runtime.sizes import format_size

    chosen = "set by PYINFER_HOME" if os.environ.get("PYINFER_HOME") else "PYINFER_HOME moves it"
    facts: Section = {"home": f"{paths.home()} ({chosen})"}
    for folder in (paths.models_dir(), paths.kernels_dir()):
        n_files, n_bytes = _folder_size(folder)
        facts[folder.name] = f"{n_files} files, {format_size(n_bytes)}" if n_files else "empty"
    return facts


def _folder_size(folder: Path) -> tuple[int, int]:
    n_files = n_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                n_bytes += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue  # removed meanwhile
            n_files += 1
    return n_files, n_bytes


def _versions() -> Section:
    facts: Section = {
        "pyinfer": pyinfer.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
    }
    for package in (*_PACKAGES, *_GPU_PACKAGES):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package not in _GPU_PACKAGES:
                facts[package] = "not installed" + (": 'pyinfer pull' needs it" if package == "pip" else "")
    return facts
