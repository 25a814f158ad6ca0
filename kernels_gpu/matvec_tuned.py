"""Cuts of matrix-vector products that `benchmarks/gpu_tune.py` measured on a GPU: a file for each kind under `PYINFER_HOME/gpu`,
which every stage that opens on such a GPU reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from pyinfer.kernels_gpu.matvec_tuning import GATED_TUNED, MAX_TOKENS, TUNED, Problem, Tuning, is_usable
from pyinfer.kernels_gpu.sources import with_includes
from pyinfer.paths import home

_SOURCES = ("gemv.cu", "gemv_gated.cu")
_Key = tuple[bool, tuple[str, ...], int, int]  # gated, types, rows, columns


class TunedCuts:
    """What is known for GPUs of this name with these kernels, for 1, 2, .. tokens each; what cannot be read is not known."""

    def __init__(self, device_name: str, folder: Path | None = None) -> None:
        digest = hashlib.sha256(device_name.encode())
        for source in _SOURCES:
            digest.update(with_includes(source).encode())
        self.path = (folder or home() / "gpu") / f"matvec-{digest.hexdigest()[:16]}.json"
        self._known: dict[_Key, tuple[Tuning, ...]] = {}
        try:
            for entry in json.loads(self.path.read_text()):
                key = bool(entry["gated"]), tuple(map(str, entry["kinds"])), int(entry["rows"]), int(entry["columns"])
                self._known[key] = tuple(Tuning(*map(int, cut)) for cut in entry["cuts"])
        except (OSError, ValueError, TypeError, KeyError):
            self._known = {}

    def use(self, arch: int) -> None:
        """Have products choose these cuts."""
        for (is_gated, kinds, n_rows, n_columns), cuts in self._known.items():
            problems = [Problem(kinds, n_rows, n_columns, n) for n in range(1, len(cuts) + 1)]
            fits = all(is_usable(cut, problem, arch) for cut, problem in zip(cuts, problems, strict=True))
            if fits and len({(cut.lanes, cut.split) for cut in cuts}) == 1 and len(cuts) <= MAX_TOKENS:
                (GATED_TUNED if is_gated else TUNED)[arch, kinds, n_rows, n_columns] = cuts

    def put(self, problem: Problem, cuts: Sequence[Tuning], *, is_gated: bool) -> None:
        """For 1, 2, .. tokens of a product; the problem's number of them does not matter."""
        self._known[is_gated, problem.kinds, problem.n_rows, problem.n_columns] = tuple(cuts)

    def save(self) -> None:
        entries = [
            {
                "gated": is_gated,
                "kinds": kinds,
                "rows": n_rows,
                "columns": n_columns,
                "cuts": [astuple(cut) for cut in cuts],
            }
            for (is_gated, kinds, n_rows, n_columns), cuts in self._known.items()
        ]
        part = self.path.with_suffix(f".{os.getpid()}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(entries, indent=0))
        os.replace(part, self.path)
