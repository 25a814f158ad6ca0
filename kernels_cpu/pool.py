"""The persistent thread pool: its threads live inside one nogil call and walk whole programs."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.kernels_cpu.compiler import cache_folder
from pyinfer.kernels_cpu.isa import ISA
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.opcode import OP_WORDS


class Program:
    """Op records [n_ops, OP_WORDS] with a step header."""

    def __init__(self, ops: npt.NDArray[np.int64], step: npt.NDArray[np.int64]) -> None:
        assert ops.shape[1] == OP_WORDS and ops.flags.c_contiguous
        self.ops, self.step = ops, step


class Pool:
    """`n_threads` threads, the caller's included; `run` is not reentrant."""

    def __init__(self, n_threads: int, scratch_bytes: int, isa: ISA, max_ops: int) -> None:
        walker = _load_walker(isa)
        self._walker = walker
        self.n_threads = n_threads
        self._max_ops = max_ops
        n_bytes = walker.THREADS + n_threads * walker.RECORD + (max_ops + 1) * walker.LINE
        self._control = allocate(n_bytes + walker.LINE)
        self._at = -(-address(self._control) // walker.LINE) * walker.LINE
        self._scratch = [allocate(scratch_bytes) for _ in range(n_threads)]
        self._threads = [
            threading.Thread(
                target=walker.work, args=(self._at, i, n_threads, address(scratch)), name=f"pyinfer-{i}", daemon=True
            )
            for i, scratch in enumerate(self._scratch[1:], start=1)
        ]
        for thread in self._threads:
            thread.start()
        # also when nobody closes the pool: its threads read memory that goes with it
        self._stop = weakref.finalize(self, _stop, walker, self._at, self._control, self._threads, self._scratch)

    def run(self, program: Program) -> None:
        assert len(program.ops) <= self._max_ops and self._stop.alive
        scratch = address(self._scratch[0])
        self._walker.submit(
            self._at, address(program.ops), len(program.ops), address(program.step), self.n_threads, scratch
        )

    def close(self) -> None:
        """Join the threads; afterwards the pool cannot run anything."""
        self._stop()


def _load_walker(isa: ISA) -> Any:
    """The module `walker`, which Numba compiles on first use and keeps where the kernels are kept, if it can."""
    from numba.core import config

    # Numba keys its cache by source file and CPU but not by this package's other sources: the folder does
    folder = cache_folder(isa) / "numba"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.fspath(folder) if os.access(folder, os.W_OK) else ""
    except OSError:
        place = ""
    vars(config)["CACHE_DIR"] = place
    from pyinfer.kernels_cpu import walker

    return walker


def _stop(
    walker: Any, at: int, control: npt.NDArray[np.uint8], threads: Sequence[threading.Thread], scratch: Any
) -> None:
    """End the threads of a pool; `control` and `scratch` are held so that their memory outlives them."""
    walker.stop(at, len(threads) + 1)
    for thread in threads:
        thread.join()
