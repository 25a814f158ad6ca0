"""How `cuda/matmul_mma.cu` cuts a product: tiles, stages in shared memory, and shares of the work.

The default comes from a model of one multiprocessor in clock cycles, not yet checked on a card; what is measured at
load wins. A block's stay is bounded by the slowest of
- memory: a chunk's bytes at the multiprocessor's share of the read bandwidth (H200: 4.65 TB/s / 132 / 1.7 GHz = 21 bytes),
- the tensor cores: `mma.sync` reaches about 2,500 FLOP a cycle on sm_90 (60 % of what wgmma could), 2,048 on sm_80,
- the L2: weights and rows of x at about 40 bytes a cycle, which is why high tiles are wanted,
- shared memory: 128 bytes a cycle; every warp reads all of x, so 64 weight rows a warp take a quarter of what 16 would,
- instructions: four a cycle, of which decoding takes three to five a weight (once for all rows of a tile) and products the rest.
Bounds that are near each other get in each other's way, which is why their fourth powers are added. What the kernel's machine
code takes was counted (`benchmarks/gpu_limits.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, sqrt

from pyinfer.kernels_gpu.launch import Defines
from pyinfer.kernels_gpu.weights_layout import layout_of

_TILE_ROWS = (8, 16, 32, 64, 128)  # rows of activations of a tile; 128 are 128 float32 sums a thread
# bytes of a unit of 32 columns in each part, as the kernel stages them: codes, high, scales
_UNIT_PARTS = {
    "Q4_0": (16, 2), "Q4_1": (16, 4), "Q5_0": (16, 4, 2), "Q5_1": (16, 4, 4), "Q8_0": (32, 2),
    "Q2_K": (8, 2), "Q3_K": (8, 4, 2), "Q4_K": (16, 2), "Q5_K": (16, 4, 2), "Q6_K": (16, 8, 2),
}  # fmt: skip
_WITH_D = ("Q2_K", "Q3_K", "Q6_K")  # 16 bytes more of a row and chunk
_CHUNK_UNITS = {"Q2_K": (8,), "Q3_K": (8,), "Q4_K": (8,), "Q5_K": (8,), "Q6_K": (8,), "Q8_0": (4, 2)}
FLOAT_KINDS = ("F16", "BF16")
MMA_KINDS = (*FLOAT_KINDS, *_UNIT_PARTS)
_FLOPS_A_CYCLE = {75: 512, 80: 2048, 86: 1024, 89: 1024, 90: 2500}  # of a multiprocessor, float32 sums
_L2_BYTES, _MEMORY_BYTES = 40.0, 21.0  # a cycle and multiprocessor
_SHARED_BYTES = 128.0
# instructions' cycles of a weight: decoding, and what a warp's share of it takes that is divided by its fragments
_CYCLES_A_WEIGHT, _CYCLES_A_FRAGMENT = 0.026, 0.012
_MORE_CYCLES = {"Q2_K": 0.008, "Q3_K": 0.010, "Q5_0": 0.006, "Q5_1": 0.006, "Q5_K": 0.006, "Q6_K": 0.008}
_STATIC_SHARED = 528  # bytes that the kernels declare at most, beside the rings: `expert_mma` a number a row
_START_CYCLES, _SPLIT_CYCLES = 3000, 2000  # filling the ring; meeting in the workspace


@dataclass(frozen=True, slots=True)
class GPU:
    """What the choice depends on."""

    arch: int
    n_sms: int
    shared_bytes: int  # largest of a block


@dataclass(frozen=True, slots=True)
class Tiling:
    """The defines of the kernel and the shares of its blocks."""

    rows: int  # BM: activation rows of a tile, a multiple of 8
    fragments: int  # MT: times 16 weight rows a warp
    warps: int
    chunk_units: int  # of 32 columns, in a stage of weights
    x_columns: int  # KX: in a stage of activations
    w_stages: int
    x_stages: int
    blocks: int  # on a multiprocessor
    units_per_block: int  # chunks of tiles that one block works through

    def defines(self, kind: str) -> Defines:
        """As the kernels take them; shapes are arguments, so that few variants serve a model."""
        units = () if kind in FLOAT_KINDS else (("UNITS", self.chunk_units),)
        return (
            ("TYPE", kind), ("BM", self.rows), ("MT", self.fragments), ("WARPS", self.warps), ("KX", self.x_columns),
            ("W_STAGES", self.w_stages), ("X_STAGES", self.x_stages), ("BLOCKS_PER_SM", self.blocks), *units,
        )  # fmt: skip

    @property
    def tile(self) -> int:
        """Weight rows of a tile."""
        return self.warps * self.fragments * 16

    @property
    def chunk_columns(self) -> int:
        return self.chunk_units * 32

    def shared_bytes(self, kind: str) -> int:
        weights = self.w_stages * self.tile * chunk_row_bytes(kind, self.chunk_units)
        return weights + self.x_stages * self.rows * self.x_columns * 2

    def n_tiles(self, m: int, widths: tuple[int, ...]) -> int:
        return ceil(m / self.rows) * sum(ceil(n / self.tile) for n in widths)

    def n_units(self, m: int, widths: tuple[int, ...], columns: int) -> int:
        return self.n_tiles(m, widths) * ceil(columns / self.chunk_columns)

    def n_blocks(self, m: int, widths: tuple[int, ...], columns: int) -> int:
        return ceil(self.n_units(m, widths, columns) / self.units_per_block)

    @property
    def partial_bytes(self) -> int:
        """Workspace of one block: its two partial tiles of float32 sums."""
        return 2 * self.tile * self.rows * 4


def chunk_row_bytes(kind: str, units: int) -> int:
    """Shared memory of a row of a chunk; every part takes at least the 16 bytes that one copy moves."""
    if kind in FLOAT_KINDS:
        return units * 64
    return sum(max(16, units * size) for size in _UNIT_PARTS[kind]) + (16 if kind in _WITH_D else 0)


def chunk_units(kind: str, columns: int) -> int:
    """Units of a chunk: 2 of floats, 8 of K types, else the most that wastes little behind the end of a row."""
    if kind in FLOAT_KINDS:
        return 2
    options = _CHUNK_UNITS.get(kind, (8, 4, 2))
    waste = {units: ceil(columns / (32 * units)) * 32 * units / columns for units in options}
    return next((units for units in options if waste[units] <= 1.06), min(options, key=lambda units: waste[units]))


@lru_cache(maxsize=4096)
def tilings(kind: str, m: int, widths: tuple[int, ...], columns: int, gpu: GPU) -> tuple[Tiling, ...]:
    """Every sensible way, best first by the model."""
    found: dict[Tiling, float] = {}
    units = chunk_units(kind, columns)
    for rows in _tile_rows(m, gpu):
        for warps, fragments in ((8, 2), (8, 1), (4, 2), (4, 1), (4, 4)):
            cut = _staged(kind, rows, warps, fragments, units, gpu)
            if cut is None or (fragments == 4 and not _has_registers(rows, gpu)):
                continue
            whole = ceil(columns / cut.chunk_columns)
            n_units, slots = cut.n_units(m, widths, columns), gpu.n_sms * cut.blocks
            even = ceil(n_units / slots)
            for share in {even, ceil(n_units / gpu.n_sms), ceil(even / whole) * whole}:
                shared_out = _with_share(cut, share)
                found[shared_out] = model_cycles(shared_out, kind, m, widths, columns, gpu)
    return tuple(sorted(found, key=found.__getitem__))


def model_cycles(cut: Tiling, kind: str, m: int, widths: tuple[int, ...], columns: int, gpu: GPU) -> float:
    """Clock cycles of the whole product by the model above."""
    weights = cut.tile * cut.chunk_columns
    w_bytes = weights * sum(part.row_bytes for part in layout_of(kind, 1, 256).parts) / 256
    x_bytes = cut.rows * cut.chunk_columns * 2
    products = weights * cut.rows
    bounds = (
        w_bytes / ceil(m / cut.rows) / _MEMORY_BYTES,
        (w_bytes + x_bytes) / _L2_BYTES,
        2 * products / _FLOPS_A_CYCLE.get(gpu.arch, 2048),
        weights * (_CYCLES_A_WEIGHT + _MORE_CYCLES.get(kind, 0.0) + _CYCLES_A_FRAGMENT / cut.fragments)
        + products * (1 + 1 / cut.fragments) / 8192,
        (4 * w_bytes + x_bytes + products / (8 * cut.fragments)) / _SHARED_BYTES,
    )
    n_blocks = cut.n_blocks(m, widths, columns)
    blocks_a_sm = ceil(n_blocks / gpu.n_sms)
    splits = cut.units_per_block % ceil(columns / cut.chunk_columns) != 0
    # what waits is hidden by other warps, or by other sums of the same warp
    hiding = min(blocks_a_sm, cut.blocks) * cut.warps * min(2.0, max(1.0, cut.fragments * cut.rows / 64))
    together = sqrt(sqrt(sum(bound**4 for bound in bounds)))
    work = cut.units_per_block * blocks_a_sm * together * (1 + 4 / hiding)
    meeting = _SPLIT_CYCLES + 3 * cut.tile * cut.rows * 4 / _L2_BYTES if splits else 0
    return _START_CYCLES + work + meeting


def _tile_rows(m: int, gpu: GPU) -> list[int]:
    """Rows of a tile: of few sizes, so that few variants are compiled, those that fit m."""
    sizes = [size for size in _TILE_ROWS if size <= 64 or gpu.shared_bytes > 100 << 10]
    return [size for size in sizes if m > size // 2 and (size >= 64 or m <= 2 * size)] or [sizes[0]]


def _has_registers(rows: int, gpu: GPU) -> bool:
    """For 64 weight rows a warp: fewer rows of x are not worth it, more do not fit, and ptxas fits 64 on sm_90 only."""
    return gpu.arch >= {32: 80, 64: 90}.get(rows, 1000)


def _staged(kind: str, rows: int, warps: int, fragments: int, units: int, gpu: GPU) -> Tiling | None:
    """The deepest rings that fit, with as many blocks on a multiprocessor as registers and shared memory hold."""
    few_sums = fragments * rows // 2 <= 32  # float32 sums a thread; then 128 registers do
    resident = 16 if few_sums else 8  # warps
    for blocks in dict.fromkeys((resident // warps, 1)):
        for x_columns in (128, 64) if rows <= 16 and units >= 4 else (64,):
            steps = units * 32 // x_columns
            for w_stages, x_stages in ((4, 4), (3, 4), (3, 3), (2, 4), (2, 3), (2, 2)):
                if x_stages - 1 > (w_stages - 1) * steps or (w_stages > 2 and steps > 2):
                    continue
                cut = Tiling(rows, fragments, warps, units, x_columns, w_stages, x_stages, blocks, 1)
                if blocks * (cut.shared_bytes(kind) + _STATIC_SHARED + 1024) <= gpu.shared_bytes + 1024:
                    return cut
    return None


def _with_share(cut: Tiling, share: int) -> Tiling:
    fields = (
        cut.rows,
        cut.fragments,
        cut.warps,
        cut.chunk_units,
        cut.x_columns,
        cut.w_stages,
        cut.x_stages,
        cut.blocks,
    )
    return Tiling(*fields, units_per_block=share)
