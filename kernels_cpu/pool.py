"""The persistent thread pool: its threads live inside one nogil call and walk whole programs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.kernels_cpu.compiler import compiler_for
from pyinfer.kernels_cpu.control import LINE, RECORD, THREADS
from pyinfer.kernels_cpu.isa import ISA
from pyinfer.kernels_cpu.memory import address, allocate
from pyinfer.kernels_cpu.numba_code import numba_function
from pyinfer.kernels_cpu.opcode import OP_WORDS


class Program:
    """Op records [n_ops, OP_WORDS] with a step header."""

    def __init__(self, ops: npt.NDArray[np.int64], step: npt.NDArray[np.int64]) -> None:
        assert ops.shape[1] == OP_WORDS and ops.flags.c_contiguous
        self.ops, self.step = ops, step


class Pool:
    """`n_threads` threads, the caller's included; `run` is not reentrant."""

    def __init__(self, n_threads: int, scratch_bytes: int, isa: ISA, max_ops: int) -> None:
        self._submit = _walker(isa, "submit", 6)
        work, stop = _walker(isa, "work", 4), _walker(isa, "stop", 2)
        self.n_threads = n_threads
        self._max_ops = max_ops
        n_bytes = THREADS + n_threads * RECORD + (max_ops + 1) * LINE
        self._control = allocate(n_bytes + LINE)
        self._at = -(-address(self._control) // LINE) * LINE
        self._scratch = [allocate(scratch_bytes) for _ in range(n_threads)]
        self._threads = [
            threading.Thread(
                target=work, args=(self._at, i, n_threads, address(scratch)), name=f"pyinfer-{i}", daemon=True
            )
            for i, scratch in enumerate(self._scratch[1:], start=1)
        ]
        for thread in self._threads:
            thread.start()
        # also when nobody closes the pool: its threads read memory that goes with it
        self._stop = weakref.finalize(self, _stop, stop, self._at, self._control, self._threads, self._scratch)

    def run(self, program: Program) -> None:
        assert len(program.ops) <= self._max_ops and self._stop.alive
        scratch = address(self._scratch[0])
        self._submit(self._at, address(program.ops), len(program.ops), address(program.step), self.n_threads, scratch)

    def close(self) -> None:
        """Join the threads; afterwards the pool cannot run anything."""
        self._stop()


def _walker(isa: ISA, function: str, n_args: int) -> Callable[..., None]:
    return numba_function(compiler_for(isa), "pyinfer.kernels_cpu.walker", function, n_args)


def _stop(
    stop: Callable[..., None],
    at: int,
    control: npt.NDArray[np.uint8],
    threads: Sequence[threading.Thread],
    scratch: Any,
) -> None:
    """End the threads of a pool; `control` and `scratch` are held so that their memory outlives them."""
    stop(at, len(threads) + 1)
    for thread in threads:
        thread.join()
