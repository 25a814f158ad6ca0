"""Measuring at load how large products are done, once for each GPU and shape: the result is kept under `PYINFER_HOME/gpu`.

For each bucket of rows a product is run with the best few tilings of the model, from 64 rows on by cuBLAS as well, on the
model's own weights and in the stage's own memory, after a warm-up (an idle H200 clocks down to a fifth). For a model of 8B
that is some 150 products of 0.01 to 3 ms, and kernels that are compiled once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, fields, replace
from pathlib import Path

from pyinfer.graph.ops import MatMul
from pyinfer.kernels_gpu.launch import Buffer, Step
from pyinfer.kernels_gpu.matmul import (
    MatmulMemory,
    arrival_bytes,
    build_matmul,
    is_float16,
    mma_kernel,
    problems_of,
    scratch_bytes,
)
from pyinfer.kernels_gpu.matmul_route import Problem, Route, slice_options, tiling_options
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.mma_tiling import GPU, Tiling
from pyinfer.kernels_gpu.operand import operand_at, operand_bytes
from pyinfer.kernels_gpu.products import operand_form
from pyinfer.kernels_gpu.sources import with_includes
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.kernels_gpu.workspace import ValuePlan
from pyinfer.paths import home

_CUBLAS_ROWS = 64  # with fewer, packed weights always win
_MOST_OUTPUTS = 256  # rows that go through the head together
_TILINGS = 4  # of each product
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
        self._known: dict[str, list[int]] = {}  # slice_rows, then the fields of a tiling if there is one
        try:
            known = json.loads(self._path.read_text())
            self._known = {str(key): [int(value) for value in values] for key, values in known.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._known = {}

    def get(self, problem: Problem, float16: bool) -> Route | None:
        known = self._known.get(_key(problem, float16), [])
        if len(known) == 1 + len(fields(Tiling)):
            return Route(known[0], Tiling(*known[1:]))
        return Route(known[0]) if len(known) == 1 else None

    def put(self, problem: Problem, float16: bool, route: Route) -> None:
        tiling = astuple(route.tiling) if route.tiling else ()
        self._known[_key(problem, float16)] = [route.slice_rows, *tiling]

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
    table, unknown = memory.routes, dict[tuple[Problem, bool], list[Product]]()
    for m in sorted(buckets, reverse=True):  # the most memory is asked for first
        for problem, products in _problems(memory, m):
            key = problem, is_float16(products, memory.copies)
            route = cache.get(*key)
            if route is None:
                unknown[key] = products
            else:
                table.measured[key] = route
    if not unknown:
        return
    options = {key: route_options(key[0], table.gpu) for key in unknown}
    cuts = {(key[0].kind, route.tiling) for key, routes in options.items() for route in routes if route.tiling}
    memory.device.prepare([mma_kernel(kind, cut) for kind, cut in cuts])
    for i, (key, products) in enumerate(unknown.items()):
        bench = _Bench(memory, key[0], products, clock)
        if i == 0:
            bench.warm_up(options[key][0])
        table.measured[key] = bench.fastest(options[key])
        cache.put(*key, table.measured[key])
    cache.save()


def route_options(problem: Problem, gpu: GPU) -> list[Route]:
    """What is worth measuring."""
    by_cublas = slice_options(problem) if problem.m >= _CUBLAS_ROWS else []
    return [*tiling_options(problem, gpu, _TILINGS), *by_cublas]


def _problems(memory: StageMemory, m: int) -> Iterator[tuple[Problem, list[Product]]]:
    for op in memory.graph.ops:
        if isinstance(op, MatMul) and (op.outs[0].rows == "tokens" or m <= _MOST_OUTPUTS):
            weights = [weight for weight in op.weights if operand_form(weight, m) == "h16"]
            yield from problems_of([Product(memory.weights[weight], _NOWHERE) for weight in weights], m)


class _Bench:
    """One problem in memory that is borrowed from the stage's workspace."""

    def __init__(self, memory: StageMemory, problem: Problem, products: list[Product], clock: Clock) -> None:
        self._memory, self._problem, self._clock = memory, problem, clock
        plan = ValuePlan(memory.workspace, memory.graph)
        self._x = operand_at(
            "h16", problem.m, problem.columns, plan.scratch(operand_bytes("h16", problem.m, problem.columns))
        )
        memory.device.zero(self._x.data)
        self._x = replace(self._x, scales=None)  # as most rows have none: behind a norm, attention or a bounded gate
        self._products = [
            Product(product.weight, plan.scratch(4 * problem.m * product.weight.layout.n_rows)) for product in products
        ]
        self._plan = plan

    def fastest(self, routes: list[Route]) -> Route:
        times = [self._seconds(route) for route in routes]
        return routes[times.index(min(times))]

    def warm_up(self, route: Route) -> None:
        executable = self._memory.device.capture(self._steps(route))
        end = self._clock() + _WARM_UP
        while self._clock() < end:
            self._memory.device.run(executable)
            self._memory.device.synchronize()

    def _steps(self, route: Route) -> list[Step]:
        gpu, memory = self._memory.routes.gpu, self._memory
        scratch = self._plan.scratch(scratch_bytes(self._problem, route, gpu))
        counters = memory.counters(arrival_bytes(self._problem, route, gpu))
        work = MatmulMemory(scratch, counters, memory.copies)
        # what stands alone is mostly added to rows that are there
        residual = self._products[0].out if len(self._products) == 1 else None
        steps = build_matmul(self._x, self._problem, self._products, route, work, gpu, residual=residual)
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
