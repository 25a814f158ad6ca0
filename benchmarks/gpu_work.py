"""How much each kernel of a step has to do: what `gpu_limits.py` multiplies with the cost of its machine code.

A kernel is declared by a function of its launch and the step, under its name in `WORK`; `declared` adds one from another
module. It says how many bytes come from device memory, how often the warps of the launch together go through the largest
loop and through all the rest, and how much a resident warp asks for at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from pyinfer.kernels_gpu.launch import Kernel, Launch
from pyinfer.kernels_gpu.matvec_tuning import step_columns
from pyinfer.kernels_gpu.weights_layout import layout_of


@dataclass(frozen=True)
class StepFacts:
    """What a launch does not say."""

    n_tokens: int
    depth: int  # positions before a sequence's tokens
    n_sequences: int


@dataclass(frozen=True)
class Share:
    """Warps of a launch that run the loop of one kernel, which may be another variant: one that has only that loop."""

    kernel: Kernel
    turns: float  # of the loop, over all warps
    rest: float  # how often what is outside of it is run, over all warps
    around: float = 0.0  # the same of what is inside of loops around it; 0: as often as the rest


@dataclass(frozen=True)
class Work:
    n_bytes: float
    shares: tuple[Share, ...]
    in_flight: float = 0.0  # bytes of a warp
    ahead: bool = False  # asked for before the kernel before has ended
    n_blocks: int = 0  # that have something to do; 0: all
    wide_conflict: int = 1  # see gpu_sass.code_of


Declaration = Callable[[Launch, StepFacts], Work]
WORK: dict[str, Declaration] = {}


def declared(name: str) -> Callable[[Declaration], Declaration]:
    """Of the kernel of this name."""

    def add(declaration: Declaration) -> Declaration:
        WORK[name] = declaration
        return declaration

    return add


def work_of(launch: Launch, facts: StepFacts) -> Work:
    """Of a kernel without a declaration: its instructions once, and latency."""
    return WORK.get(launch.kernel.name, _once)(launch, facts)


def n_warps(launch: Launch) -> int:
    return launch.grid[0] * launch.grid[1] * launch.grid[2] * -(-launch.block[0] // 32)


def _once(launch: Launch, facts: StepFacts) -> Work:
    return Work(0.0, (Share(launch.kernel, 1.0 * n_warps(launch), 1.0 * n_warps(launch)),))


def _defines(launch: Launch) -> dict[str, Any]:
    return dict(launch.kernel.defines)


def _bits(kind: str) -> float:
    return sum(part.row_bytes for part in layout_of(kind, 1, 256).parts) / 32


def _with(kernel: Kernel, **changes: int | str) -> Kernel:
    return replace(kernel, defines=tuple((name, changes.get(name, value)) for name, value in kernel.defines))


@declared("gemv")
def _gemv(launch: Launch, facts: StepFacts) -> Work:
    d, args = _defines(launch), launch.args
    columns = d["COLUMNS"]
    lanes, split, rows, warps = d["LANES"], d["SPLIT"], d["ROWS"], d["WARPS"]
    block_rows = warps // split * (32 // lanes) * rows
    n_bytes, shares, widest = 0.0, [], 0.0
    for i in range(d["SEGMENTS"]):
        kind, n = d[f"TYPE{i}"], int(args[7 + 5 * i])  # type: ignore[arg-type]
        passes = ceil(n / block_rows) * warps
        rounds = ceil(ceil(columns / step_columns(kind)) / (lanes * split))
        alone = _with(launch.kernel, TYPE0=kind, TYPE1=kind, TYPE2=kind, SEGMENTS=1)
        blocks = int(args[8 + 5 * i])  # type: ignore[arg-type]
        shares.append(Share(alone, float(passes * rounds), float(blocks * warps), float(passes)))
        n_bytes += n * columns * _bits(kind) / 8
        widest = max(widest, 32 * rows * d["DEPTH"] * step_columns(kind) * _bits(kind) / 8)
    return Work(n_bytes, tuple(shares), widest, d["DEPTH"] > 1)


@declared("gemv_gated")
def _gemv_gated(launch: Launch, facts: StepFacts) -> Work:
    d, args = _defines(launch), launch.args
    kind, columns, n = d["TYPE"], d["COLUMNS"], int(args[5])  # type: ignore[arg-type]
    rounds = ceil(ceil(columns / step_columns(kind)) / d["LANES"])
    passes = 2 * n / (32 // d["LANES"] * d["ROWS"])
    a_step = step_columns(kind) * _bits(kind) / 8
    share = Share(launch.kernel, passes * rounds, float(n_warps(launch)), passes)
    in_flight = 32 * d["ROWS"] * d["DEPTH"] * a_step
    return Work(
        2 * n * columns * _bits(kind) / 8,
        (share,),
        in_flight,
        d["DEPTH"] > 1,
    )


@declared("attention_decode")
def _attention_decode(launch: Launch, facts: StepFacts) -> Work:
    """Every sequence at the same depth; pages of 16-bit floats."""
    d = _defines(launch)
    head, n_kv = d["HEAD"], d["N_KV"]
    lanes = 1 << (head // 8 - 1).bit_length()
    tile = d["UNROLL"] * (32 // lanes)  # positions of a warp's turn
    length = facts.depth + 1
    n_tiles = ceil(length / (tile * d["WARPS"]))
    splits, passes, tokens = launch.grid[0], launch.grid[1] // n_kv, launch.grid[2]
    used = ceil(n_tiles / max(d["MIN_TILES"], ceil(n_tiles / splits)))
    blocks = used * launch.grid[1] * tokens
    turns = n_tiles * d["WARPS"] * launch.grid[1] * tokens
    n_bytes = 4.0 * head * n_kv * length * tokens
    return Work(
        n_bytes * passes,
        (Share(launch.kernel, float(turns), float(blocks * d["WARPS"])),),
        4.0 * head * tile,
        n_blocks=blocks,
    )
