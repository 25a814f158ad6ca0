"""How `cuda/gemv.cu` cuts a product: defaults from the shape, and tables of what was measured to be better (`matvec_tuned`).

The order of additions in a row depends on `lanes` and `split`. They are functions of the matrix alone, so that a token's
numbers are the same whatever number of others is decoded with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

MAX_TOKENS = 8
STATIC_SHARED_BYTES = 48 << 10  # of a block
_STEP_COLUMNS = {"F32": 4, "F16": 8, "BF16": 8, "Q8_0": 16}
_TILE_BYTES = {"F32": 16, "F16": 16, "BF16": 16, "Q2_K": 16, "Q5_0": 24, "Q5_1": 24, "Q4_K": 32, "Q5_K": 36, "Q6_K": 32}
_SHARED_KIB = {75: 64, 80: 164, 87: 164, 90: 228}  # of a multiprocessor; 100 for others
_BLOCK_OVERHEAD = 1024  # bytes of shared memory that the system takes of each block
_IN_FLIGHT = 64 << 10  # bytes a multiprocessor must have asked for at any time: bandwidth times latency, doubled
_FEWEST_WARPS = 11  # on a multiprocessor, for which more rows a lane are given up
_ASYNC_COPIES = 80  # before, a tile is waited for when it is asked for, and a ring of one leaves room for more warps
# blocks of 4 warps on a multiprocessor, as registers allow: (tokens up to, rows) -> blocks
_MIN_BLOCKS = {
    (1, 1): 8,
    (1, 2): 6,
    (1, 4): 4,
    (2, 1): 6,
    (2, 2): 5,
    (2, 4): 3,
    (4, 1): 5,
    (4, 2): 4,
    (4, 4): 3,
    (8, 1): 4,
    (8, 2): 3,
    (8, 4): 3,
}


def step_columns(kind: str) -> int:
    """Columns that a lane takes at a time: `kColumns` in weight_*.cuh."""
    return _STEP_COLUMNS.get(kind, 32)


def tile_bytes(kind: str) -> int:
    """Shared memory of a lane's step of one row: `kTileBytes` in weight_*.cuh."""
    return _TILE_BYTES.get(kind, 20)


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
    rows: int  # a lane works on at a time
    depth: int  # tiles of each of them that are asked for at a time
    passes: int  # times a warp takes other rows
    warps: int  # a block
    min_blocks: int  # on a multiprocessor: bounds the registers to 65536 / (threads * min_blocks)

    @property
    def block_rows(self) -> int:
        """Of one pass."""
        return self.warps // self.split * (32 // self.lanes) * self.rows

    def n_blocks(self, n_rows: int) -> int:
        """Of a matrix of so many rows."""
        return -(-n_rows // (self.block_rows * self.passes))

    def shared_bytes(self, problem: Problem) -> int:
        """Static shared memory of a block: the ring and the sums."""
        tile = max(tile_bytes(kind) for kind in problem.kinds)
        sums = 2 * 4 * (32 // self.lanes) * self.rows * problem.n_tokens
        return self.warps * (32 * self.depth * self.rows * tile + sums)


# what `neighbours` tries
_VALUES: dict[str, tuple[int, ...]] = {
    "rows": (1, 2, 4),
    "min_blocks": (2, 3, 4, 5, 6, 8),
    "depth": (2, 3, 4, 6),
    "passes": (1, 2, 4),
    "split": (1, 2, 4),
    "lanes": (8, 16, 32),
    "warps": (4, 8),
}
_FREE = ("min_blocks", "depth", "passes")  # of which defaults have other values too
# (compute capability * 10, kinds, rows, columns) -> for 1, 2, .. tokens
TUNED: dict[tuple[int, tuple[str, ...], int, int], tuple[Tuning, ...]] = {}
# the same for `gemv_gated.cu`
GATED_TUNED: dict[tuple[int, tuple[str, ...], int, int], tuple[Tuning, ...]] = {}


def tuning_of(problem: Problem, n_sms: int, arch: int) -> Tuning:
    """What was measured for this shape on this kind of GPU, or the default."""
    measured = TUNED.get((arch, problem.kinds, problem.n_rows, problem.n_columns), ())
    if len(measured) >= problem.n_tokens:
        return measured[problem.n_tokens - 1]
    default = default_tuning(problem, n_sms, arch)
    return replace(default, lanes=measured[0].lanes, split=measured[0].split) if measured else default


def default_tuning(problem: Problem, n_sms: int, arch: int) -> Tuning:
    """As many rows a lane as leave enough warps, and enough bytes asked for to hide the latency.

    x comes from the L1 for all rows that a lane works on at a time, and by the count of `benchmarks/gpu_limits.py` that way is as
    busy as the one from memory: with one row a lane it takes longer.
    """
    lanes, split, rows = _lanes_split_and_rows(problem, n_sms)
    return _tuning(problem, n_sms, arch, lanes, split, rows)


def neighbours(tuning: Tuning, problem: Problem, arch: int) -> Iterator[Tuning]:
    """Those that fit and differ in one thing, or in rows and split so that there are as many warps; more than one token's
    add in the same order."""
    others = [replace(tuning, **{name: value}) for name, values in _VALUES.items() for value in values]
    others += (
        [replace(tuning, rows=2 * tuning.rows, split=2 * tuning.split)] if 2 * tuning.rows in _VALUES["rows"] else []
    )
    others += (
        [replace(tuning, rows=tuning.rows // 2, split=tuning.split // 2)] if min(tuning.rows, tuning.split) > 1 else []
    )
    for other in dict.fromkeys(others):
        in_order = problem.n_tokens == 1 or (other.lanes, other.split) == (tuning.lanes, tuning.split)
        if other != tuning and in_order and is_usable(other, problem, arch):
            yield other


def is_usable(tuning: Tuning, problem: Problem, arch: int) -> bool:
    """Whether the kernel can be compiled and launched like that."""
    known = all(getattr(tuning, name) in values for name, values in _VALUES.items() if name not in _FREE)
    return known and min(astuple(tuning)) > 0 and tuning.warps % tuning.split == 0 and _fits(problem, tuning, arch)


def gated_tuning_of(problem: Problem, n_sms: int, arch: int) -> Tuning:
    """For `gemv_gated.cu`, whose blocks make 32 columns each: `rows` counts both matrices, `split` and `passes` are 1."""
    measured = GATED_TUNED.get((arch, problem.kinds, problem.n_rows, problem.n_columns), ())
    if len(measured) >= problem.n_tokens:
        return measured[problem.n_tokens - 1]
    return gated_tuning(problem, n_sms, arch)


def gated_neighbours(tuning: Tuning, problem: Problem, arch: int) -> Iterator[Tuning]:
    """As `neighbours`, for `gemv_gated.cu`; warps change with rows too, so that passes stay whole."""
    both = (replace(tuning, rows=rows, warps=warps) for rows in (2, 4) for warps in (4, 8))
    for other in dict.fromkeys((*neighbours(tuning, problem, arch), *both)):
        pairs = other.warps * (32 // other.lanes) * other.rows // 2
        whole = other.rows % 2 == 0 and 32 % pairs == 0 and other.split == other.passes == 1
        if whole and other != tuning and _fits(problem, other, arch):
            yield other


def gated_tuning(problem: Problem, n_sms: int, arch: int) -> Tuning:
    """The default of `gated_tuning_of`."""
    lanes = _lanes(problem)
    # more and smaller warps where there are few blocks; 32 pairs of rows are whole passes either way
    rows, warps = (4, 4) if problem.n_rows // 2 >= 3 * n_sms * 32 or lanes < 32 else (2, 8)
    min_blocks = max(1, _MIN_BLOCKS[_ceiling(problem.n_tokens), rows] * 4 // warps)
    if arch < _ASYNC_COPIES:
        return Tuning(lanes, 1, rows, 1, 1, warps, _without_ring(rows, min_blocks))
    tuning = Tuning(lanes, 1, rows, 2, 1, warps, min_blocks)
    while (
        tuning.depth < 4 and replace(tuning, depth=tuning.depth + 1).shared_bytes(problem) <= STATIC_SHARED_BYTES - 2048
    ):
        tuning = replace(tuning, depth=tuning.depth + 1)
    return tuning


def _tuning(problem: Problem, n_sms: int, arch: int, lanes: int, split: int, rows: int) -> Tuning:
    min_blocks = _MIN_BLOCKS[_ceiling(problem.n_tokens), rows]
    one = Tuning(lanes, split, rows, 1, 1, 4, min_blocks)
    waves = one.n_blocks(problem.n_rows) / (n_sms * min_blocks)
    passes = min(4, max(1, int(waves / 2)))
    if arch < _ASYNC_COPIES:
        return Tuning(lanes, split, rows, 1, passes, 4, _without_ring(rows, min_blocks))
    # the bytes of a step of all resident lanes
    share = min(step_columns(kind) * _bits(kind) / 8 for kind in problem.kinds)
    depth = round(_IN_FLIGHT / (32 * 4 * min_blocks * rows * share))
    depth = min(max(depth, 2), 8, max(2, -(-_steps(problem) // (lanes * split)) * passes))
    while depth > 2:
        tuning = Tuning(lanes, split, rows, depth, passes, 4, min_blocks)
        if _fits(problem, tuning, arch):
            break
        depth -= 1
    return Tuning(lanes, split, rows, depth, passes, 4, min_blocks)


def _without_ring(rows: int, min_blocks: int) -> int:
    """What is loaded takes registers before it is stored to shared memory."""
    return min(min_blocks, 2) if rows == 4 else min_blocks


def _fits(problem: Problem, tuning: Tuning, arch: int) -> bool:
    """Shared memory of a block, of all blocks of a multiprocessor, and at least 32 registers a thread."""
    shared = tuning.shared_bytes(problem)
    room = _SHARED_KIB.get(arch, 100) * 1024
    threads = 32 * tuning.warps * tuning.min_blocks
    return (
        shared <= STATIC_SHARED_BYTES
        and tuning.min_blocks * (shared + _BLOCK_OVERHEAD) <= room
        and threads * 32 <= 65536
    )


def _bits(kind: str) -> float:
    return {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5}.get(kind) or int(kind[1]) + 0.5


def _ceiling(n_tokens: int) -> int:
    return next(most for most in (1, 2, 4, 8) if n_tokens <= most)


def _steps(problem: Problem) -> int:
    """Of a row, for the type with the smallest."""
    return max(-(-problem.n_columns // step_columns(kind)) for kind in problem.kinds)


def _lanes(problem: Problem) -> int:
    """That share a row: few of them idle at its end."""
    steps = _steps(problem)
    idle = {lanes: -(-steps // lanes) * lanes / steps for lanes in (32, 16, 8)}
    return next(lanes for lanes in (32, 16, 8) if idle[lanes] <= 1.15 * min(idle.values()))


def _lanes_split_and_rows(problem: Problem, n_sms: int) -> tuple[int, int, int]:
    """The most rows a lane for which some split of them leaves warps for all multiprocessors."""
    lanes, steps = _lanes(problem), _steps(problem)
    for rows in (4, 2):
        for split in (1, 2, 4):
            fits = steps >= split * lanes and 8 * -(-steps // (split * lanes)) * split * lanes <= 9 * steps
            if fits and problem.n_rows * lanes * split >= 32 * rows * _FEWEST_WARPS * n_sms:
                return lanes, split, rows
    split = 1
    while split < 4 and steps >= 2 * split * lanes and problem.n_rows * lanes * split < 32 * _FEWEST_WARPS * n_sms:
        split *= 2
    return lanes, split, 1
