"""How `cuda/gemv.cu` cuts a product: defaults from the shape, and a table of what was measured to be better.

The order of additions in a row depends on `lanes` and `split`. They are functions of the matrix alone, so that a token's
numbers are the same whatever number of others is decoded with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

MAX_TOKENS = 8
_RESIDENT_WARPS = 32  # on a multiprocessor, with 64 registers a thread
_STEP_COLUMNS = {"F32": 4, "F16": 8, "BF16": 8, "Q8_0": 16}


def step_columns(kind: str) -> int:
    """Columns that a lane takes at a time: `kColumns` in weight_*.cuh."""
    return _STEP_COLUMNS.get(kind, 32)


@dataclass(frozen=True, slots=True)
class Problem:
    """A product of up to 8 rows with matrices that lie one above the other."""

    kinds: tuple[str, ...]  # of the matrices, as their codecs are named
    n_rows: int  # of all matrices together
    n_columns: int
    n_tokens: int  # rows of x, 1..8


@dataclass(frozen=True, slots=True)
class Tuning:
    """The defines of gemv.cu."""

    lanes: int  # that share a row: 8, 16 or 32
    split: int  # warps that share a row
    rows: int  # a lane works on
    unroll: int  # steps that are asked for at a time
    warps: int  # a block
    min_blocks: int  # on a multiprocessor: bounds the registers to 65536 / (threads * min_blocks)

    @property
    def block_rows(self) -> int:
        return self.warps // self.split * (32 // self.lanes) * self.rows


# (compute capability * 10, kinds, rows, columns) -> for 1, 2, .. tokens; `benchmarks/gpu_check.py --tune` measures
TUNED: dict[tuple[int, tuple[str, ...], int, int], tuple[Tuning, ...]] = {}


def tuning_of(problem: Problem, n_sms: int, arch: int) -> Tuning:
    """What was measured for this shape on this kind of GPU, or the default."""
    measured = TUNED.get((arch, problem.kinds, problem.n_rows, problem.n_columns))
    if measured is not None and len(measured) >= problem.n_tokens:
        return measured[problem.n_tokens - 1]
    return default_tuning(problem, n_sms)


def default_tuning(problem: Problem, n_sms: int) -> Tuning:
    """Enough warps to fill the GPU once, more rows a lane where there are plenty, at least 64 bytes asked for by each lane."""
    lanes, split = _lanes_and_split(problem, n_sms)
    steps = -(-_steps(problem) // (lanes * split))  # of a lane
    groups = problem.n_rows * lanes * split // 32  # warps at one row a lane
    if problem.n_tokens == 1:
        options = [Tuning(lanes, split, 1, _unroll(steps, 4), 8, 4), Tuning(lanes, split, 2, _unroll(steps, 2), 8, 3)]
        return max(options, key=lambda tuning: _fill(problem, tuning, n_sms))
    if problem.n_tokens == 2:
        rows = 2 if groups >= 2 * 12 * n_sms else 1
        return Tuning(lanes, split, rows, _unroll(steps, 4 // rows), 8, 2)
    # three and more: x comes from the L1 for every row of w, so rows share it
    rows = next((rows for rows in (4, 2) if groups >= rows * 12 * n_sms), 1)
    return Tuning(lanes, split, rows, _unroll(steps, 4 // rows) if problem.n_tokens < 5 else 1, 4, 4 if rows < 4 else 3)


def candidates(problem: Problem, n_sms: int, fixed: Tuning | None = None) -> Iterator[Tuning]:
    """What is worth measuring; with `fixed`, the choice for one token, only what adds in the same order."""
    default = default_tuning(problem, n_sms)
    steps = _steps(problem)
    orders = [(fixed.lanes, fixed.split)] if fixed else product((8, 16, 32), (1, 2, 4, 8))
    for lanes, split in orders:
        of_lane = -(-steps // (lanes * split))
        for rows, unroll, (warps, min_blocks) in product(
            (1, 2, 4), (1, 2, 3, 4, 7), ((4, 4), (4, 6), (8, 2), (8, 3), (8, 4))
        ):
            if split <= warps and unroll <= of_lane and rows * unroll <= 8:
                yield replace(
                    default, lanes=lanes, split=split, rows=rows, unroll=unroll, warps=warps, min_blocks=min_blocks
                )


def _steps(problem: Problem) -> int:
    """Of a row, for the type with the smallest."""
    return max(-(-problem.n_columns // step_columns(kind)) for kind in problem.kinds)


def _lanes_and_split(problem: Problem, n_sms: int) -> tuple[int, int]:
    steps = _steps(problem)
    idle = {lanes: -(-steps // lanes) * lanes / steps for lanes in (32, 16, 8)}
    lanes = next(lanes for lanes in (32, 16, 8) if idle[lanes] <= 1.15 * min(idle.values()))
    split = 1
    warps = problem.n_rows * lanes / 32
    while split < 8 and steps >= 2 * split * lanes and 2 * split * warps <= n_sms * _RESIDENT_WARPS:
        split *= 2
    return lanes, split


def _unroll(steps: int, most: int) -> int:
    """Of 1..`most`, what leaves the fewest steps over in the last round; the largest of equals."""
    return min(range(1, most + 1), key=lambda unroll: (-(-steps // unroll) * unroll, -unroll))


def _fill(problem: Problem, tuning: Tuning, n_sms: int) -> float:
    """The share of time that places for blocks are taken: a few waves of blocks end evenly only by luck."""
    waves = problem.n_rows / tuning.block_rows / (n_sms * tuning.min_blocks)
    whole = -(-waves // 1)
    return waves / whole if whole <= 2 else waves / (waves + 0.5)
