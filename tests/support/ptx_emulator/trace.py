"""What a launch on the PTX emulator did to memory: races between its threads, and what each line of a kernel costs.

The numbers are those of `compute-sanitizer --tool racecheck` and of Nsight Compute's source view ("Memory L1 Transactions",
"L2 Theoretical Sectors"): sectors of 32 bytes and passes of the 32 banks of shared memory for each request of a warp.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from cuda_emulator.build import CACHE, NICE

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ("trace.cpp", "trace.h", "trace_races.h")]
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

    def table(self, lines: Lines | None = None) -> str:
        """Markdown: each source line's requests, and sectors or passes of one of them with the least possible."""
        rows = [
            "| line | what | requests | lanes | bytes a lane | done a request | ideal | efficiency |",
            "|" + "---|" * 8,
        ]
        for each in self.by_line(lines):
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


@lru_cache(maxsize=1)
def trace_library() -> ctypes.CDLL:
    """The analyser alone, compiled once; the runtime of the emulator that traces has it too."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:24]
    path = CACHE / f"trace-{digest}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            target = Path(folder) / "trace.so"
            flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w")
            subprocess.run([*NICE, "g++", *flags, "-o", str(target), str(_SOURCES[0])], check=True)
            os.replace(target, path)
    return ctypes.CDLL(str(path))


def races_of(launches: Sequence[KernelTrace]) -> list[tuple[str, Race]]:
    """With the kernels they are of."""
    return [(launch.kernel, race) for launch in launches for race in launch.races]


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
