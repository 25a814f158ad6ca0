"""`TracingDevice`: a `PTXDevice` that keeps what each kernel did to memory when it was first launched."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ptx_emulator.build import module_of, trace_library
from ptx_emulator.device import PTXDevice
from ptx_emulator.trace import KernelTrace, Lines, Tracer
from pyinfer.kernels_gpu.kernel_cache import unit_of
from pyinfer.kernels_gpu.launch import Kernel, Launch


class TracingDevice(PTXDevice):
    """`traces` has every kernel's first launch; with `always` its launches together, counts apart."""

    def __init__(self, *, transactions: bool = True, always: bool = False, **options: Any) -> None:
        super().__init__(trace=True, **options)
        self._tracer, self._transactions, self._always = Tracer(trace_library()), transactions, always
        self.traces: dict[Kernel, list[KernelTrace]] = {}

    def _run(self, launch: Launch) -> None:
        is_new = self._always or launch.kernel not in self.traces
        self._tracer.reset(races=is_new, transactions=is_new and self._transactions)
        super()._run(launch)
        if is_new:
            self.traces.setdefault(launch.kernel, []).extend(self._tracer.launches())

    def races(self) -> list[str]:
        """Of all kernels, for people."""
        return [
            f"{kernel}: {race.describe(lines_of(kernel, self.arch))}"
            for kernel, traces in self.traces.items()
            for trace in traces
            for race in trace.races
        ]


@lru_cache(maxsize=256)
def lines_of(kernel: Kernel, arch: int = 90) -> Lines:
    """The source line of each line of a kernel's PTX."""
    return {line: f"{file}:{number}" for line, (file, number) in module_of(unit_of(kernel), arch).places.items()}
