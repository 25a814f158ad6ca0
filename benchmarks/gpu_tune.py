"""Look for better cuts of `gemv.cu` and `gemv_gated.cu` on a GPU, for the shapes of some models. They are kept under
`PYINFER_HOME/gpu`, where every model that opens on such a GPU finds them.

    python benchmarks/gpu_tune.py [--shapes 8b 8b-q8_0 1b] [--tokens 1 8 4 2] [--seconds 330]

From the default, everything that differs in one thing is measured and the best is taken, until nothing is better. A measurement
runs a CUDA graph over copies of the matrices that together are several times the L2, after a warm-up; the shortest of a few
counts. Shapes are taken in turns of one number of tokens, one first, so that a limit of time leaves the important ones done;
numbers of tokens that were left out take the next larger's cut, or the default.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from pyinfer.kernels_gpu.device import Device  # noqa: E402
from pyinfer.kernels_gpu.launch import Buffer, Launch  # noqa: E402
from pyinfer.kernels_gpu.matvec import Product, build_matvec  # noqa: E402
from pyinfer.kernels_gpu.matvec_gated import build_gated_matvec, can_fuse_gated  # noqa: E402
from pyinfer.kernels_gpu.matvec_tuned import TunedCuts  # noqa: E402
from pyinfer.kernels_gpu.matvec_tuning import (  # noqa: E402
    Problem,
    Tuning,
    gated_neighbours,
    gated_tuning_of,
    neighbours,
    tuning_of,
)
from pyinfer.kernels_gpu.operand import Form, operand_at, operand_bytes  # noqa: E402
from pyinfer.kernels_gpu.weights import DeviceWeight  # noqa: E402
from pyinfer.kernels_gpu.weights_layout import FLOAT_BYTES, layout_of  # noqa: E402

Matrices = tuple[tuple[str, int], ...]  # (type, rows) of matrices of one input
K, Q6, Q8 = "Q4_K", "Q6_K", "Q8_0"
SHAPES: dict[str, tuple[tuple[Matrices, int], ...]] = {
    "8b": (
        (((K, 14336), (K, 14336)), 4096), (((K, 4096),), 14336), (((Q6, 4096),), 14336), (((K, 4096),), 4096),
        (((K, 4096), (K, 1024), (Q6, 1024)), 4096), (((K, 4096), (K, 1024), (K, 1024)), 4096), (((Q6, 128256),), 4096),
    ),
    "8b-q8_0": (
        (((Q8, 14336), (Q8, 14336)), 4096), (((Q8, 4096),), 14336), (((Q8, 4096),), 4096),
        (((Q8, 4096), (Q8, 1024), (Q8, 1024)), 4096), (((Q8, 128256),), 4096),
    ),
    "1b": (
        (((K, 8192), (K, 8192)), 2048), (((K, 2048),), 8192), (((Q6, 2048),), 8192), (((K, 2048),), 2048),
        (((K, 2048), (K, 512), (Q6, 512)), 2048), (((K, 2048), (K, 512), (K, 512)), 2048), (((Q6, 128256),), 2048),
    ),
}  # fmt: skip
COPIES_BYTES = 400 << 20  # several times the L2
WARM_UP, RUNS = 0.5, 5


class Bench:
    """One shape with copies of its matrices; contents do not matter to the time. Two alike are gate and up."""

    def __init__(self, device: Device, matrices: Matrices, columns: int, memory: Buffer) -> None:
        self.kinds = tuple(kind for kind, _ in matrices)
        self.n_rows, self.columns = sum(rows for _, rows in matrices), columns
        self._device = device
        layouts = [layout_of(kind, rows, columns) for kind, rows in matrices]
        self.n_bytes = sum(layout.n_bytes for layout in layouts)
        place = 0

        def take(n_bytes: int) -> Buffer:
            nonlocal place
            part = memory.at(place, n_bytes)
            place += -(-n_bytes // 256) * 256
            return part

        form: Form = "f32" if self.kinds[0] in FLOAT_BYTES else "a8"
        self._x = [operand_at(form, n, columns, take(operand_bytes(form, n, columns))) for n in range(1, 9)]
        width = layouts[0].n_rows
        self._gated_out = [operand_at("a8", n, width, take(operand_bytes("a8", n, width))) for n in range(1, 9)]
        outs = [take(4 * 8 * layout.n_rows) for layout in layouts]
        self._copies: list[list[Product]] = []
        while not self._copies or len(self._copies) * self.n_bytes < COPIES_BYTES:
            self._copies.append(
                [Product(DeviceWeight(each, take(each.n_bytes)), out) for each, out in zip(layouts, outs, strict=True)]
            )
        first = [product.weight for product in self._copies[0]]
        self.is_gated = len(first) == 2 and can_fuse_gated(first[0], first[1])

    def problem(self, n_tokens: int) -> Problem:
        return Problem(self.kinds, self.n_rows, self.columns, n_tokens)

    def start(self, n_tokens: int) -> Tuning:
        choose = gated_tuning_of if self.is_gated else tuning_of
        return choose(self.problem(n_tokens), self._device.n_sms, self._device.arch)

    def neighbours(self, n_tokens: int, tuning: Tuning) -> Iterator[Tuning]:
        others = gated_neighbours if self.is_gated else neighbours
        return others(tuning, self.problem(n_tokens), self._device.arch)

    def steps(self, n_tokens: int, tuning: Tuning) -> list[Launch]:
        """One product with each copy."""
        x, out, gpu = self._x[n_tokens - 1], self._gated_out[n_tokens - 1], self._device
        found: list[Launch] = []
        for products in self._copies:
            if self.is_gated:
                gate, up = (product.weight for product in products)
                found += build_gated_matvec(
                    out, x, gate, up, "silu", n_tokens, n_sms=gpu.n_sms, arch=gpu.arch, tuning=tuning
                )
            else:
                found += build_matvec(x, products, n_tokens, n_sms=gpu.n_sms, arch=gpu.arch, tuning=tuning)
        return found

    def seconds(self, n_tokens: int, tuning: Tuning) -> float:
        """Of one product."""
        graph = self._device.capture(self.steps(n_tokens, tuning))
        times = []
        for _ in range(1 + RUNS):
            began = time.perf_counter()
            self._device.run(graph)
            self._device.synchronize()
            times.append(time.perf_counter() - began)
        return min(times[1:]) / len(self._copies)


def search(device: Device, bench: Bench, n_tokens: int, start: Tuning) -> tuple[Tuning, float, float]:
    """(best, its seconds, those of the start)."""
    best, first = start, bench.seconds(n_tokens, start)
    fastest, known = first, {start}
    while True:
        others = [tuning for tuning in bench.neighbours(n_tokens, best) if tuning not in known]
        device.prepare([bench.steps(n_tokens, tuning)[0].kernel for tuning in others])
        known.update(others)
        times = {tuning: bench.seconds(n_tokens, tuning) for tuning in others}
        winner = min(times, key=lambda tuning: times[tuning], default=best)
        if not others or times[winner] > 0.99 * fastest:
            return best, fastest, first
        best, fastest = winner, times[winner]


def warm_up(bench: Bench) -> None:
    tuning = bench.start(1)
    until = time.perf_counter() + WARM_UP
    while time.perf_counter() < until:
        bench.seconds(1, tuning)


def tune(device: Device, shapes: Sequence[tuple[Matrices, int]], tokens: Sequence[int], limit: float) -> None:
    began = time.monotonic()
    memory = device.alloc(3 * COPIES_BYTES)
    device.upload(memory, np.random.default_rng(0).integers(0, 64, memory.n_bytes, dtype=np.uint8))
    best: dict[tuple[Matrices, int], dict[int, Tuning]] = {}
    kept = TunedCuts(device.name)
    for n_tokens in dict.fromkeys((1, *tokens)):
        for matrices, columns in shapes:
            if time.monotonic() - began > limit:
                break
            bench = Bench(device, matrices, columns, memory)
            warm_up(bench)
            found = best.setdefault((matrices, columns), {})
            start = bench.start(n_tokens)
            if n_tokens > 1:
                start = replace(start, lanes=found[1].lanes, split=found[1].split)
            found[n_tokens], seconds, first = search(device, bench, n_tokens, start)
            rate = bench.n_bytes / 1e9
            print(
                f"{bench.kinds} {bench.n_rows} x {columns}, {n_tokens} tokens: {1e6 * seconds:.1f} us, {rate / seconds:.0f} GB/s"
                f" (before {1e6 * first:.1f} us, {rate / first:.0f} GB/s) {found[n_tokens]}",
                flush=True,
            )
            kept.put(bench.problem(1), filled(found), is_gated=bench.is_gated)
            kept.save()
    print(f"kept in {kept.path}")


def filled(found: dict[int, Tuning]) -> list[Tuning]:
    """For 1, 2, .. tokens."""
    return [found[min(n for n in found if n >= i)] for i in range(1, max(found) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["8b", "1b"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 8, 4, 2])
    parser.add_argument("--seconds", type=float, default=330, help="begin no new shape after this")
    options = parser.parse_args()
    from pyinfer.kernels_gpu.cupy_device import CuPyDevice

    shapes = list(dict.fromkeys(shape for name in options.shapes for shape in SHAPES[name]))
    tune(CuPyDevice(0), shapes, options.tokens, options.seconds)


if __name__ == "__main__":
    main()
