"""A lower bound of a step's time on a GPU that is not here, kernel by kernel. A model, not a measurement.

    python benchmarks/gpu_limits.py [--model llama-3.1-8b] [--mix Q4_K_M] [--sequences 1] [--depth 0] [--nvdisasm FILE] [--goals]
    python benchmarks/gpu_limits.py --prompt 2048 [--copies]

The graph is lowered for the card as it would be there, its kernels compiled by NVRTC and disassembled. The time of a kernel is
the largest of: its bytes at the read bandwidth that was measured on one H200, or at what the requests in flight allow
(Little's law), the busiest multiprocessor's share counted; and the cycles of the busiest pipe. To that come what passes between
two kernels of a CUDA graph, where the later one has already asked for its first bytes, and the way of the last bytes through
the sums. Both are guesses (`Card`); `--exposed` tries others. What a kernel does is declared in `gpu_work.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from gpu_sass import PIPES, Code, code_of, find_disassembler  # noqa: E402
from gpu_shapes import RecordingDevice  # noqa: E402
from gpu_work import StepFacts, Work, work_of  # noqa: E402
from gpu_work_many import gemm_seconds  # noqa: E402
from synthetic_model import MIXES, SHAPES, write_synthetic  # noqa: E402

from pyinfer.graph.backend import StageConfig  # noqa: E402
from pyinfer.graph.graph import Graph  # noqa: E402
from pyinfer.graph.passes import optimize  # noqa: E402
from pyinfer.graph.split import expandable_weights  # noqa: E402
from pyinfer.kernels_gpu.bounds import Lengths  # noqa: E402
from pyinfer.kernels_gpu.fusion import GatedGroup  # noqa: E402
from pyinfer.kernels_gpu.kernel_cache import unit_of  # noqa: E402
from pyinfer.kernels_gpu.launch import Gemm, Launch, Step  # noqa: E402
from pyinfer.kernels_gpu.lower import lower  # noqa: E402
from pyinfer.kernels_gpu.program import ProgramShape  # noqa: E402
from pyinfer.kernels_gpu.stage_memory import StageMemory  # noqa: E402
from pyinfer.quant.codecs import codec_by_name  # noqa: E402
from pyinfer.quant.tensor import QuantTensor  # noqa: E402
from pyinfer.runtime.models.registry import build_graph  # noqa: E402


@dataclass(frozen=True)
class Card:
    """An H200: bandwidth was measured, the rest is from data sheets or guessed."""

    arch: int = 90
    n_sms: int = 132
    clock: float = 1.755e9  # under load
    bandwidth: float = 4.65e12
    latency: float = 0.7e-6  # of device memory under load
    sm_bandwidth: float = 64 * 1.755e9  # one multiprocessor's way to the L2
    exposed: float = 1.2e-6  # from the end of a kernel to the first work of the next, which is resident already
    drain: float = 0.5e-6  # from the last bytes to the end of the kernel
    shared_bytes: int = 228 << 10


_SHOWN = ("TYPE", "TYPE0", "LANES", "SPLIT", "ROWS", "WARPS", "DEPTH", "UNROLL")  # of a kernel's defines
# model, mix, sequences, depth, tokens a second
GOALS = (
    ("llama-3.1-8b", "Q4_K_M", 1, 0, 600), ("llama-3.1-8b", "Q4_K_M", 1, 4096, 550), ("llama-3.1-8b", "Q4_K_M", 1, 16384, 450),
    ("llama-3.1-8b", "Q4_K_M", 8, 128, 3500), ("llama-3.1-8b", "Q8_0", 1, 0, 420), ("llama-3.2-1b", "Q4_K_M", 1, 0, 2000),
    ("llama-3.1-8b", "Q4_K_M", 32, 128, 9000), ("llama-3.1-8b", "Q4_K_M", 64, 128, 13000),
    ("llama-3.1-8b", "Q4_K_M", 128, 128, 20000),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Seconds of one launch."""

    name: str
    work: Work
    memory: float  # bytes on their way, without what was asked for ahead
    compute: float  # the busiest pipe
    pipe: str
    fixed: float
    registers: int
    warps: float  # resident on a multiprocessor
    in_flight: float  # bytes on the whole card

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.fixed


def graph_of(model: str, mix: str) -> Graph:
    """The model's graph; all of its matrices are one byte seen again and again."""
    written: dict[str, Any] = {}

    def keep(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        written.update(metadata=metadata, tensors=tensors)

    with patch("synthetic_model.stream_gguf", keep):
        write_synthetic(Path("no such file"), model, mix)
    tensors = {}
    for name, stream in written["tensors"].items():
        codec, shape = codec_by_name(stream.codec), stream.shape
        if len(shape) == 1:
            data = next(iter(stream.chunks()))
        else:
            data = np.broadcast_to(np.zeros(1, np.uint8), (shape[0], codec.row_bytes(shape[1])))
        tensors[name] = QuantTensor(name, codec, shape, data)
    file: Any = SimpleNamespace(path=Path("shape.gguf"), metadata=written["metadata"], tensors=tensors)
    return optimize(build_graph(file))


def steps_of(graph: Graph, card: Card, shape: ProgramShape, n_ctx: int, *, copies: bool = False) -> tuple[Step, ...]:
    """The launches of a step, with float16 copies of the matrices or without. Rows of weights are taken to be short."""
    pages = 2 + shape.n_sequences * -(-n_ctx // 16)
    config = StageConfig(
        n_pages=pages, max_tokens=max(shape.n_tokens, 512), max_sequences=shape.n_sequences, n_ctx=n_ctx
    )
    device = RecordingDevice(card.arch, card.n_sms)
    memory = StageMemory(device, graph, config)
    if copies:
        for tensor in expandable_weights(graph):
            memory.copies[memory.weights[tensor].buffer.ptr] = device.alloc(2 * tensor.n_elements)
    gates = [group.matmul for group in memory.groups if isinstance(group, GatedGroup)]
    memory.lengths.update({memory.weights[w].buffer.ptr: Lengths(1.1, 1.0) for op in gates for w in op.weights})
    return lower(memory, shape).steps


def estimate(launch: Launch, work: Work, own: Code, codes: Sequence[Code], card: Card) -> Estimate:
    """`codes`: of the shares of the work, `own`: of the launch."""
    blocks = work.n_blocks or launch.grid[0] * launch.grid[1] * launch.grid[2]
    warps = -(-launch.block[0] // 32)
    registers = -(-own.resources.registers // 8) * 8
    shared = own.resources.shared_bytes + launch.shared_bytes + 1024
    resident = max(1, min(65536 // (registers * 32 * warps), card.shared_bytes // shared, 64 // warps, 32))
    busiest = ceil(blocks / card.n_sms) / blocks  # share of the work of one multiprocessor, dealt out evenly
    at_once = min(blocks, resident * card.n_sms)
    in_flight = at_once * warps * work.in_flight
    memory = 0.0
    if work.n_bytes:
        ahead = min(in_flight, card.exposed * card.bandwidth) if work.ahead else 0.0  # while nothing else reads
        left = max(0.0, work.n_bytes - ahead)
        rate = min(card.bandwidth, in_flight / card.latency)
        one = min(card.sm_bandwidth, min(resident, ceil(blocks / card.n_sms)) * warps * work.in_flight / card.latency)
        memory = max(left / rate, left * busiest / one)
    total: dict[str, float] = dict.fromkeys(PIPES, 0.0)  # scheduler cycles
    for share, code in zip(work.shares, codes, strict=True):
        for name in PIPES:
            total[name] += code.rest[name] * share.rest + code.loop[name] * share.turns
            total[name] += code.around[name] * (share.around or share.rest)
    pipe, cycles = max(total.items(), key=lambda item: item[1])
    compute = cycles * max(busiest, 1 / card.n_sms) / 4 / card.clock
    fixed = card.drain + (card.exposed if launch.overlap else card.exposed + 1.3e-6)
    return Estimate(
        launch.kernel.name, work, memory, compute, pipe, fixed, own.resources.registers,
        min(resident, blocks / card.n_sms) * warps, in_flight,
    )  # fmt: skip


def estimates(steps: Sequence[Step], facts: StepFacts, card: Card, disassembler: str) -> list[Estimate]:
    launches = [step for step in steps if isinstance(step, Launch)]
    works = [work_of(launch, facts) for launch in launches]
    wanted = {(launch.kernel, work.wide_conflict) for launch, work in zip(launches, works, strict=True)}
    wanted |= {(share.kernel, work.wide_conflict) for work in works for share in work.shares}
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda key: code_of(key[0], card.arch, disassembler, key[1]), wanted))
    codes = dict(zip(wanted, found, strict=True))
    return [
        estimate(
            launch, work, codes[launch.kernel, work.wide_conflict],
            [codes[share.kernel, work.wide_conflict] for share in work.shares], card,
        )
        for launch, work in zip(launches, works, strict=True)
    ]  # fmt: skip


def report(steps: Sequence[Step], found: Sequence[Estimate], n_tokens: int, goal: float | None) -> None:
    """Launches that are alike are one line."""
    launches = [step for step in steps if isinstance(step, Launch)]
    alike: dict[tuple[Any, ...], list[Estimate]] = {}
    for launch, one in zip(launches, found, strict=True):
        alike.setdefault((unit_of(launch.kernel), launch.grid, one.work.n_bytes), []).append(one)
    heads = ("count", "MB", "memory us", "compute us", "pipe", "fixed us", "us each", "registers", "warps", "KB ahead")
    print(f"{'kernel':17}" + "".join(f"{head:>11}" for head in heads) + "  cut")
    for (unit, _, _), group in alike.items():
        one = group[0]
        cells = (
            f"{len(group)}", f"{one.work.n_bytes / 1e6:.1f}", f"{1e6 * one.memory:.2f}", f"{1e6 * one.compute:.2f}", one.pipe,
            f"{1e6 * one.fixed:.2f}", f"{1e6 * one.seconds:.2f}", f"{one.registers}", f"{one.warps:.1f}",
            f"{one.in_flight / Card.n_sms / 1024:.1f}",
        )  # fmt: skip
        cut = " ".join(f"{name}={value}" for name, value in unit[1] if name in _SHOWN)
        print(f"{one.name:17}" + "".join(f"{cell:>11}" for cell in cells) + f"  {cut}")
    seconds, fixed = sum(one.seconds for one in found), sum(one.fixed for one in found)
    gemms = Counter(step for step in steps if isinstance(step, Gemm))
    sizes: Counter[tuple[int, int, int, float]] = Counter()
    for gemm, count in gemms.items():
        sizes[gemm.m, gemm.n, gemm.k, gemm_seconds(gemm, Card.n_sms, Card.bandwidth)] += count
    for (m, n, k, each), count in sizes.items():
        print(f"{'cuBLAS':17}{count:11}{'':>55}{1e6 * each:11.2f}  {m} x {n} x {k}")
        seconds += count * each
    print(
        f"{len(found)} kernels, {sum(one.work.n_bytes for one in found) / 1e9:.2f} GB: at least {1e6 * seconds:.0f} us, "
        f"{1e6 * fixed:.0f} of them between kernels; at most {n_tokens / seconds:.0f} tokens/s by this model, which no card has "
        f"confirmed" + (f"; the goal is {goal:.0f}" if goal else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--mix", default="Q4_K_M", choices=MIXES)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt's step, instead of decoding")
    parser.add_argument("--copies", action="store_true", help="float16 copies of the matrices are kept")
    parser.add_argument("--goals", action="store_true", help="each line of issue 5 that decodes")
    parser.add_argument("--exposed", type=float, default=1e6 * Card.exposed, help="microseconds between kernels")
    parser.add_argument("--nvdisasm", help="the file; else the one on PATH")
    options = parser.parse_args()
    disassembler, card = find_disassembler(options.nvdisasm), Card(exposed=1e-6 * options.exposed)
    rows: Sequence[tuple[str, str, int, int, float | None]] = GOALS
    if not options.goals:
        rows = [(options.model, options.mix, options.sequences, options.depth, None)]
    if options.prompt:
        n, depth = options.prompt, options.depth
        print(
            f"\n{options.model} {options.mix}, a prompt's step of {n} tokens at depth {depth}: a model, not a measurement"
        )
        shape = ProgramShape("prompt", n, 1, 1)
        steps = steps_of(graph_of(options.model, options.mix), card, shape, n + depth, copies=options.copies)
        report(steps, estimates(steps, StepFacts(n, depth, 1), card, disassembler), n, None)
        return
    for model, mix, n, depth, goal in rows:
        print(f"\n{model} {mix}, {n} sequences at depth {depth}: a model, not a measurement")
        steps = steps_of(
            graph_of(model, mix),
            card,
            ProgramShape("decode", n, n, n, all_rows=True),
            max(1024, depth + 256),
            copies=options.copies,
        )
        report(steps, estimates(steps, StepFacts(n, depth, n), card, disassembler), n, goal)


if __name__ == "__main__":
    main()
