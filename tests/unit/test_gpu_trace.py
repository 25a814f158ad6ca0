"""The analyser of memory accesses itself (`ptx_emulator/trace.cpp`), told of made-up ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
from cuda_emulator.build import has_compiler
from ptx_emulator.build import trace_library
from ptx_emulator.trace import Counts, KernelTrace, Race, Tracer

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not has_compiler, reason="no g++")]
FULL = 0xFFFFFFFF


class Teller:
    """Tells the analyser what threads do."""

    def __init__(self, library: ctypes.CDLL, threads: int = 64, shared_bytes: int = 65536) -> None:
        self.library, self.n_threads, self.tracer = library, threads, Tracer(library)
        self.tracer.reset()
        library.trace_begin(b"made_up", 1, 1, 1, threads, shared_bytes)
        self.block(0)

    def block(self, number: int) -> None:
        self.library.trace_block(number)

    def access(self, thread: int, kind: str, address: int, site: int = 1, n_bytes: int = 4, space: str = "s") -> None:
        letters = ctypes.c_char(kind.encode()), ctypes.c_char(space.encode())
        self.library.trace_access(site, *letters, ctypes.c_uint64(address), n_bytes, thread)

    def barrier(self) -> None:
        for thread in range(self.n_threads):
            self.library.trace_block_barrier(thread, thread + 1)

    def warp_sync(self, warp: int = 0, mask: int = FULL, orders: bool = True) -> None:
        for lane in range(32):
            if mask >> lane & 1:
                self.library.trace_warp_sync(32 * warp + lane, ctypes.c_uint32(mask), int(orders))

    def fence(self, thread: int, scope: int = 1) -> None:
        self.library.trace_fence(thread, scope)

    def end(self) -> KernelTrace:
        self.library.trace_end()
        (launch,) = self.tracer.launches()
        return launch

    def races(self) -> list[Race]:
        return [race for race in self.end().races if race.what == "race"]


@pytest.fixture
def tell() -> Teller:
    return Teller(trace_library())


@pytest.mark.parametrize("kinds", ["wr", "ww", "rw", "aw", "wa", "ar", "ra"])
@pytest.mark.parametrize("others", [1, 32])
def test_what_nothing_orders_races(tell: Teller, kinds: str, others: int) -> None:
    tell.access(0, kinds[0], 128, site=7)
    tell.access(others, kinds[1], 128, site=9)
    (race,) = tell.races()
    assert (race.first.site, race.second.site, race.second.thread, race.address) == (7, 9, others, 128)


@pytest.mark.parametrize("kinds", ["rr", "aa"])
def test_reads_and_atomics_agree_with_each_other(tell: Teller, kinds: str) -> None:
    for thread in (0, 1, 40):
        tell.access(thread, kinds[0], 128)
    assert not tell.races()


def test_a_barrier_orders(tell: Teller) -> None:
    tell.access(0, "w", 0)
    tell.barrier()
    tell.access(1, "r", 0)
    tell.access(40, "r", 0)
    tell.barrier()
    tell.access(2, "w", 0)
    assert not tell.races()


def test_a_warp_sync_orders_its_lanes_only(tell: Teller) -> None:
    tell.access(0, "w", 0)
    tell.warp_sync()
    tell.access(5, "r", 0, site=2)
    tell.access(33, "r", 0, site=3)
    (race,) = tell.races()
    assert race.second.site == 3


def test_a_shuffle_orders_nothing(tell: Teller) -> None:
    tell.access(0, "w", 0)
    tell.warp_sync(orders=False)
    tell.access(5, "r", 0)
    assert len(tell.races()) == 1


def test_part_of_a_warp_syncs(tell: Teller) -> None:
    tell.access(0, "w", 0)
    tell.access(20, "w", 4)
    tell.warp_sync(mask=0xFFFF)
    tell.access(5, "r", 0, site=2)
    tell.access(5, "r", 4, site=3)
    (race,) = tell.races()
    assert race.second.site == 3


@pytest.mark.parametrize("writer", [0, 1, 2, 3])
def test_a_write_meets_each_reader(tell: Teller, writer: int) -> None:
    tell.access(0, "w", 0)
    tell.barrier()
    for reader in (1, 2, 35):
        tell.access(reader, "r", 0)
    tell.access(writer, "w", 0)
    assert tell.races()


def test_bytes_of_a_word_are_apart(tell: Teller) -> None:
    for thread in range(4):
        tell.access(thread, "w", thread, n_bytes=1)
    tell.access(9, "w", 3, site=5, n_bytes=1)
    tell.barrier()
    tell.access(40, "r", 0, n_bytes=4)
    (race,) = tell.races()
    assert (race.address, race.first.thread, race.second.thread) == (3, 3, 9)


def test_a_copy_on_its_way_is_not_touched(tell: Teller) -> None:
    tell.access(0, "p", 0, n_bytes=16)
    tell.barrier()
    tell.access(1, "r", 8, site=2)  # before it has come
    tell.access(0, "w", 0, n_bytes=16)
    tell.barrier()
    tell.access(1, "r", 8, site=3)
    assert {race.first.kind for race in tell.races() if race.second.site == 2} == {"p"}


def test_a_copy_that_has_come_is_read_behind_a_barrier(tell: Teller) -> None:
    tell.access(0, "p", 0, n_bytes=16)
    tell.access(0, "w", 0, n_bytes=16)
    tell.access(0, "r", 0, site=2)
    tell.barrier()
    tell.access(1, "r", 0, site=3)
    assert not tell.races()


def test_shared_memory_that_nobody_wrote(tell: Teller) -> None:
    tell.access(0, "w", 0)
    tell.block(1)
    tell.access(0, "r", 0, site=4)
    (race,) = tell.end().races
    assert (race.what, race.second.site) == ("uninitialised", 4)


# ---- blocks of a launch
DATA, TICKET = 0x10000, 0x20000


def last_block_merges(
    tell: Teller, *, release: bool = True, order: bool = True, acquire: bool = True, scope: int = 1
) -> None:
    """Every thread of two blocks writes, and the second block reads all, as the kernels that merge splits do."""
    for block in range(2):
        tell.block(block)
        for thread in range(tell.n_threads):
            tell.access(thread, "w", DATA + 4 * (block * tell.n_threads + thread), site=1, space="g")
            if release:
                tell.fence(thread, scope)
        if order:
            tell.barrier()
        tell.access(0, "a", TICKET, site=2, space="g")
        tell.barrier()
    for thread in range(tell.n_threads):
        if acquire:
            tell.fence(thread, scope)
    tell.access(0, "w", TICKET, site=3, space="g")
    for thread in range(tell.n_threads):
        for i in range(2 * tell.n_threads):
            tell.access(thread, "r", DATA + 4 * i, site=4, space="g")


def test_the_last_block_may_read_what_all_have_released(tell: Teller) -> None:
    last_block_merges(tell)
    assert not tell.races()


@pytest.mark.parametrize("broken", [{"release": False}, {"order": False}, {"acquire": False}, {"scope": 0}])
def test_what_a_merge_must_not_leave_out(tell: Teller, broken: dict[str, Any]) -> None:
    last_block_merges(tell, **broken)
    assert {(race.first.site, race.second.site) for race in tell.races()} >= {(1, 4)}


@pytest.mark.parametrize("kinds", ["ww", "wr", "rw", "aw", "ar"])
def test_blocks_race(tell: Teller, kinds: str) -> None:
    for block in range(2):
        tell.block(block)
        tell.access(3, kinds[block], DATA, space="g")
        tell.barrier()
    (race,) = tell.races()
    assert (race.first.block, race.second.block, race.space) == (0, 1, "g")


# ---- requests
def request(tell: Teller, address: Callable[[int], int], n_bytes: int, kind: str = "r", space: str = "s") -> Counts:
    for lane in range(32):
        tell.access(lane, kind, address(lane), n_bytes=n_bytes, space=space)
    (site,) = tell.end().sites
    assert site.requests == 1
    return site


@pytest.mark.parametrize(
    "address, n_bytes, passes, ideal",
    [
        (lambda i: 4 * i, 4, 1, 1),
        (lambda i: 0, 4, 1, 1),
        (lambda i: 8 * i, 4, 2, 1),
        (lambda i: 128 * i, 4, 32, 1),
        (lambda i: 132 * i, 4, 1, 1),
        (lambda i: 2 * i, 2, 1, 1),
        (lambda i: 8 * i, 8, 2, 2),
        (lambda i: 16 * i, 8, 4, 2),
        (lambda i: 16 * i, 16, 4, 4),
        (lambda i: 32 * i, 16, 8, 4),
        (lambda i: 128 * i, 16, 32, 4),
        (lambda i: 144 * i, 16, 4, 4),
    ],
)
def test_bank_conflicts(tell: Teller, address: Callable[[int], int], n_bytes: int, passes: int, ideal: int) -> None:
    counts = request(tell, address, n_bytes)
    assert (counts.passes, counts.ideal_passes) == (passes, ideal)


def test_atomics_of_one_word_take_turns(tell: Teller) -> None:
    assert request(tell, lambda i: i // 8 * 4, 4, kind="a").passes == 8


@pytest.mark.parametrize(
    "address, n_bytes, sectors, ideal",
    [
        (lambda i: 4 * i, 4, 4, 4),
        (lambda i: 4 * i + 4, 4, 5, 4),
        (lambda i: 0, 4, 1, 1),
        (lambda i: 64 * i, 4, 32, 4),
        (lambda i: 16 * i, 16, 16, 16),
        (lambda i: 48 * i, 16, 32, 16),
        (lambda i: i, 1, 1, 1),
    ],
)
def test_sectors(tell: Teller, address: Callable[[int], int], n_bytes: int, sectors: int, ideal: int) -> None:
    counts = request(tell, lambda i: 0x40000 + address(i), n_bytes, space="g")
    assert (counts.sectors, counts.ideal_sectors) == (sectors, ideal)


def test_turns_of_a_loop_are_requests_of_their_own(tell: Teller) -> None:
    for lane in range(32):  # a fiber runs until it has to wait
        for turn in range(3):
            tell.access(lane, "w", 4 * lane + 128 * turn)
    tell.warp_sync(orders=False)
    for lane in range(16):
        tell.access(lane, "w", 4 * lane)
    (site,) = tell.end().sites
    assert (site.requests, site.lanes, site.passes) == (4, 3 * 32 + 16, 4)


def test_a_table_names_lines(tell: Teller) -> None:
    request(tell, lambda i: 8 * i, 4)
    (launch,) = tell.tracer.launches()
    assert "| a.cu:5 | shared load | 1 | 32.0 | 4.0 | 2.00 passes | 1.00 | 50% |" in launch.table({1: "a.cu:5"})
