"""Measuring at load which way large products go, once for each GPU and shape: the result is kept under `PYINFER_HOME/gpu`.

A product of m rows is run both ways for each bucket of rows from 64 on, on the model's own weights and in the stage's own
memory, after a warm-up (an idle H200 clocks down to a fifth). For a model of 8B that is some 100 products of 0.02 to 3 ms.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from pyinfer.graph.ops import MatMul
from pyinfer.kernels_gpu.launch import Buffer, Step
from pyinfer.kernels_gpu.matmul import (
    MatmulMemory,
    arrival_bytes,
    build_matmul,
    is_float16,
    problems_of,
    scratch_bytes,
)
from pyinfer.kernels_gpu.matmul_route import Problem, Route, slice_options
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.operand import operand_at, operand_bytes
from pyinfer.kernels_gpu.products import operand_form
from pyinfer.kernels_gpu.sources import with_includes
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.kernels_gpu.workspace import ValuePlan
from pyinfer.paths import home

LEAST_ROWS = 64  # with fewer, packed weights always win
_SOURCES = ("matmul_mma.cu", "matmul_finish.cu", "dequant.cu")
_REPEATS, _RUNS = 4, 5  # of a product in a measured run; runs, of which the shortest counts
_WARM_UP = 0.3  # seconds
_NOWHERE = Buffer(0, 0)
Clock = Callable[[], float]


class RouteCache:
    """What was measured before on a GPU of this name with these kernels: a JSON file, replaced whole."""

    def __init__(self, device_name: str, folder: Path | None = None) -> None:
        digest = hashlib.sha256(device_name.encode())
        for source in _SOURCES:
            digest.update(with_includes(source).encode())
        self._path = (folder or home() / "gpu") / f"routes-{digest.hexdigest()[:16]}.json"
        try:
            self._known: dict[str, int] = {str(k): int(v) for k, v in json.loads(self._path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._known = {}

    def get(self, problem: Problem, float16: bool) -> Route | None:
        known = self._known.get(_key(problem, float16))
        return None if known is None else Route(known)

    def put(self, problem: Problem, float16: bool, route: Route) -> None:
        self._known[_key(problem, float16)] = route.slice_rows

    def save(self) -> None:
        """A cache that cannot be written costs the next load its time, nothing more."""
        part = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._known, indent=0))
            os.replace(part, self._path)
        except OSError:
            part.unlink(missing_ok=True)


def measure_routes(
    memory: StageMemory, buckets: Iterable[int], cache: RouteCache, clock: Clock = time.perf_counter
) -> None:
    """Fill `memory.routes.measured` for every product of the stage and every bucket of rows."""
    known = memory.routes.measured
    is_warm = False
    for m in sorted((m for m in buckets if m >= LEAST_ROWS), reverse=True):  # the most memory is asked for first
        for problem, products in _problems(memory, m):
            float16 = is_float16(products, memory.copies)
            if (problem, float16) in known:
                continue
            route = cache.get(problem, float16)
            if route is None:
                bench = _Bench(memory, problem, products, clock)
                if not is_warm:
                    bench.warm_up()
                    is_warm = True
                route = bench.fastest([Route(), *slice_options(problem)])
                cache.put(problem, float16, route)
            known[problem, float16] = route
    if is_warm:
        cache.save()


def _problems(memory: StageMemory, m: int) -> Iterator[tuple[Problem, list[Product]]]:
    for op in memory.graph.ops:
        if isinstance(op, MatMul) and op.outs[0].rows == "tokens" and operand_form(op.weights[0], m) == "h16":
            yield from problems_of([Product(memory.weights[weight], _NOWHERE) for weight in op.weights], m)


class _Bench:
    """One problem in memory that is borrowed from the stage's workspace."""

    def __init__(self, memory: StageMemory, problem: Problem, products: list[Product], clock: Clock) -> None:
        self._memory, self._problem, self._clock = memory, problem, clock
        plan = ValuePlan(memory.workspace, memory.graph)
        self._x = operand_at(
            "h16", problem.m, problem.columns, plan.scratch(operand_bytes("h16", problem.m, problem.columns))
        )
        memory.device.zero(self._x.data)
        if len(products) > 1:  # q, k, v and gate, up follow a norm (lower)
            self._x = replace(self._x, scales=None)
        self._products = [
            Product(product.weight, plan.scratch(4 * problem.m * product.weight.layout.n_rows)) for product in products
        ]
        self._plan = plan

    def fastest(self, routes: list[Route]) -> Route:
        times = [self._seconds(route) for route in routes]
        return routes[times.index(min(times))]

    def warm_up(self) -> None:
        executable = self._memory.device.capture(self._steps(Route()))
        end = self._clock() + _WARM_UP
        while self._clock() < end:
            self._memory.device.run(executable)
            self._memory.device.synchronize()

    def _steps(self, route: Route) -> list[Step]:
        gpu, memory = self._memory.routes.gpu, self._memory
        scratch = self._plan.scratch(scratch_bytes(self._problem, route, gpu))
        counters = memory.counters(arrival_bytes(self._problem, route, gpu))
        work = MatmulMemory(scratch, counters, memory.copies)
        steps = build_matmul(self._x, self._problem, self._products, route, work, gpu)
        self._plan.release(scratch)
        return steps * _REPEATS

    def _seconds(self, route: Route) -> float:
        device = self._memory.device
        executable = device.capture(self._steps(route))
        times = []
        for _ in range(1 + _RUNS):
            start = self._clock()
            device.run(executable)
            device.synchronize()
            times.append(self._clock() - start)
        return min(times[1:])


def _key(problem: Problem, float16: bool) -> str:
    widths = "+".join(map(str, problem.widths))
    return f"{problem.kind}{' as F16' if float16 else ''} {problem.m} x {problem.columns} x {widths}"
