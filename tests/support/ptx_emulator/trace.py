"""What a launch on the PTX emulator did to memory: races between its threads, and what each line of a kernel costs.

The numbers are those of `compute-sanitizer --tool racecheck` and of Nsight Compute's source view ("Memory L1 Transactions",
"L2 Theoretical Sectors"): sectors of 32 bytes and passes of the 32 banks of shared memory for each request of a warp.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_COUNTS = ("requests", "lanes", "bytes", "used", "sectors", "ideal_sectors", "passes", "ideal_passes")
_KINDS = {"r": "load", "w": "store", "a": "atomic", "p": "copy"}
_SPACES = {"g": "global", "s": "shared"}
Lines = Mapping[int, str]  # "rows.cu:57" by the line of the PTX


@dataclass(frozen=True, slots=True)
class Access:
    site: int  # line of the PTX
    kind: str  # r, w, a(tomic), p(romised: a copy that has been asked for)
    block: int
    thread: int  # of the block


@dataclass(frozen=True, slots=True)
class Race:
    """Two accesses of the same byte that nothing orders; `uninitialised`: one of shared memory that nobody wrote."""

    what: str
    space: str
    address: int  # of global memory, or a byte of the block's shared memory
    count: int  # bytes or words for which these two instructions raced
    first: Access
    second: Access

    def describe(self, lines: Lines | None = None) -> str:
        def one(access: Access) -> str:
            where = (lines or {}).get(access.site, f"line {access.site} of the PTX")
            return f"{_KINDS[access.kind]} at {where} by thread {access.thread} of block {access.block}"

        place = f"{_SPACES[self.space]} memory at {self.address:#x}"
        if self.what == "uninitialised":
            return f"{place}: {one(self.second)} of what nobody wrote (x{self.count})"
        return f"{place}: {one(self.first)} and {one(self.second)} (x{self.count})"


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one instruction, or of all of a source line with the same kind and space."""

    where: str
    kind: str
    space: str
    requests: int  # of warps
    lanes: int
    bytes: int  # asked for by all lanes
    used: int  # of these, distinct within a request
    sectors: int  # global memory: 32 bytes each
    ideal_sectors: int  # if what is used lay side by side
    passes: int  # shared memory
    ideal_passes: int  # without two words in a bank

    @property
    def efficiency(self) -> float:
        """What is least possible over what is done."""
        done, ideal = (self.sectors, self.ideal_sectors) if self.space == "g" else (self.passes, self.ideal_passes)
        return ideal / done if done else 1.0


@dataclass(frozen=True, slots=True)
class KernelTrace:
    kernel: str
    grid: tuple[int, int, int]
    threads: int  # of a block
    races: tuple[Race, ...]
    sites: tuple[Counts, ...]

    def by_line(self, lines: Lines | None = None) -> list[Counts]:
        """The counts by source line, those with the most sectors or passes first."""
        sums: dict[tuple[str, str, str], list[int]] = {}
        for site in self.sites:
            where = (lines or {}).get(int(site.where), f"PTX {site.where}")
            total = sums.setdefault((where, site.kind, site.space), [0] * len(_COUNTS))
            for i, name in enumerate(_COUNTS):
                total[i] += getattr(site, name)
        counts = [Counts(*key, *total) for key, total in sums.items()]
        return sorted(counts, key=lambda each: -max(each.sectors, each.passes))

    def table(self, lines: Lines | None = None, below: float = 2.0) -> str:
        """Markdown: each source line's requests, and sectors or passes of one of them with the least possible; only those of
        less efficiency than `below`. Empty if there are none."""
        counts = [each for each in self.by_line(lines) if each.efficiency < below]
        if not counts:
            return ""
        names = ("line", "what", "requests", "lanes", "bytes a lane", "done a request", "ideal", "efficiency")
        rows = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for each in counts:
            is_global = each.space == "g"
            done, ideal = (each.sectors, each.ideal_sectors) if is_global else (each.passes, each.ideal_passes)
            rows.append(
                f"| {each.where} | {_SPACES[each.space]} {_KINDS[each.kind]} | {each.requests}"
                f" | {each.lanes / each.requests:.1f} | {each.bytes / each.lanes:.1f}"
                f" | {done / each.requests:.2f} {'sectors' if is_global else 'passes'}"
                f" | {ideal / each.requests:.2f} | {each.efficiency:.0%} |"
            )
        return "\n".join(rows)


class Tracer:
    """The analyser of a loaded runtime."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.trace_report.restype = ctypes.c_char_p

    def reset(self, *, races: bool = True, transactions: bool = True) -> None:
        """Forget what was traced, and say what to look for from now on."""
        self._library.trace_reset(int(races), int(transactions))

    def launches(self) -> list[KernelTrace]:
        """Those since `reset`."""
        return [_launch(each) for each in json.loads(self._library.trace_report())]


def _launch(data: Mapping[str, Any]) -> KernelTrace:
    races = [
        Race(**{**race, "first": Access(**race["first"]), "second": Access(**race["second"])}) for race in data["races"]
    ]
    names = {each.name for each in fields(Counts)}
    sites = [
        Counts(where=str(site["site"]), **{key: value for key, value in site.items() if key in names})
        for site in data["sites"]
    ]
    x, y, z = data["grid"]
    return KernelTrace(data["kernel"], (x, y, z), data["threads"], tuple(races), tuple(sites))
