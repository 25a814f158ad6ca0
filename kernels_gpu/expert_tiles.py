"""Products of many slots with the matrices of their experts: `sort_slots` of `cuda/experts.cu`, then `cuda/expert_mma.cu`.

Slots are sorted by expert into tiles of slots of one expert, those of padding into none. How many tiles that makes is known on
the device only: there is room, and a block in the grid, for as many as there can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pyinfer.kernels_gpu.experts import Slots, slots_of_row
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.matmul import MAX_MATRICES
from pyinfer.kernels_gpu.matvec import Product
from pyinfer.kernels_gpu.mma_tiling import GPU, Tiling, tilings
from pyinfer.kernels_gpu.operand import Operand

_SORT_THREADS = 1024


@dataclass(frozen=True, slots=True)
class SlotTiles:
    """The slots of a step by their experts, in tiles of `tile_rows`."""

    tile_rows: int
    n_tiles: int  # at most
    memory: Buffer

    @property
    def expert_of_tile(self) -> Buffer:
        """int32 [n_tiles], -1 for tiles that are not needed."""
        return self.memory.at(0, 4 * self.n_tiles)

    @property
    def slot_of_row(self) -> Buffer:
        """int32 [n_tiles * tile_rows], -1 where a tile is not full."""
        return self.memory.at(4 * self.n_tiles, 4 * self.n_tiles * self.tile_rows)


def tiles_bytes(slots: Slots, tile_rows: int) -> int:
    """Memory of `SlotTiles`."""
    return 4 * _most_tiles(slots, tile_rows) * (1 + tile_rows)


def build_tiles(slots: Slots, tile_rows: int, memory: Buffer) -> tuple[SlotTiles, list[Launch]]:
    """Tiles in memory of `tiles_bytes`, and what fills it."""
    tiles = SlotTiles(tile_rows, _most_tiles(slots, tile_rows), memory)
    defines = (("N_EXPERTS", slots.n_experts), ("TILE_ROWS", tile_rows), ("THREADS", _SORT_THREADS))
    sort = Launch(
        Kernel("experts.cu", "sort_slots", defines),
        grid=(1, 1, 1),
        block=(_SORT_THREADS, 1, 1),
        args=(slots.experts, slots.n, tiles.n_tiles, tiles.expert_of_tile, tiles.slot_of_row),
        overlap=True,
    )
    return tiles, [sort]


@dataclass(frozen=True, slots=True)
class TiledProduct:
    """Matrices of one type, at most three, that one launch multiplies the same x with."""

    kind: str
    products: tuple[Product, ...]
    cut: Tiling


def tiled_products(products: Sequence[Product], slots: Slots, gpu: GPU) -> list[TiledProduct]:
    """Each launch's matrices and tiles."""

    def kind_of(product: Product) -> str:
        return product.weight.layout.kind

    found = []
    for kind, same in groupby(sorted(products, key=kind_of), key=kind_of):
        members = list(same)
        for first in range(0, len(members), MAX_MATRICES):
            part = tuple(members[first : first + MAX_MATRICES])
            columns = part[0].weight.layout.n_columns
            found.append(TiledProduct(kind, part, expert_tiling(kind, slots, _widths(part, slots), columns, gpu)))
    return found


def expert_tiling(kind: str, slots: Slots, widths: tuple[int, ...], columns: int, gpu: GPU) -> Tiling:
    """Tiles for the slots that an expert has on average; a block does all columns of its tile."""
    busy = min(slots.n, slots.n_experts)
    options = tilings(kind, max(8, -(-slots.n // busy)), tuple(n * busy for n in widths), columns, gpu)
    cut = next(option for option in options if option.fragments < 4)  # for which gathering rows leaves no registers
    return replace(cut, units_per_block=-(-columns // cut.chunk_columns))


def build_expert_matmul(x: Operand, product: TiledProduct, slots: Slots, tiles: SlotTiles) -> list[Launch]:
    """out [slots, n] of each weight [n_experts * n, columns]; x is "h16", a row for each token or for each slot."""
    cut, widths = product.cut, _widths(product.products, slots)
    assert x.form == "h16" and tiles.tile_rows == cut.rows
    columns = product.products[0].weight.layout.n_columns
    matrices: list[tuple[Buffer | None, Buffer | None, int]]
    matrices = [(each.weight.buffer, each.out, n) for each, n in zip(product.products, widths, strict=True)]
    matrices += [(None, None, 0)] * (MAX_MATRICES - len(matrices))
    return [
        Launch(
            Kernel("expert_mma.cu", "expert_mma", cut.defines(product.kind)),
            grid=(tiles.n_tiles, sum(-(-n // cut.tile) for n in widths), 1),
            block=(32 * cut.warps, 1, 1),
            args=(
                x.data, x.scales, tiles.expert_of_tile, tiles.slot_of_row, slots.n_used, slots_of_row(x, columns, slots),
                columns, slots.n_experts, *(field for matrix in matrices for field in matrix),
            ),
            shared_bytes=cut.shared_bytes(product.kind),
            overlap=True,
        )
    ]  # fmt: skip


def _widths(products: Sequence[Product], slots: Slots) -> tuple[int, ...]:
    """Rows of one expert's matrices."""
    return tuple(product.weight.layout.n_rows // slots.n_experts for product in products)


def _most_tiles(slots: Slots, tile_rows: int) -> int:
    """Full ones, and one of each expert that is not."""
    return slots.n // tile_rows + min(slots.n, slots.n_experts)
