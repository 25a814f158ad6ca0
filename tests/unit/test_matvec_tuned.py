"""Cuts that were measured on a GPU are kept for GPUs of that name and used from then on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyinfer.kernels_gpu.matvec_tuned import TunedCuts
from pyinfer.kernels_gpu.matvec_tuning import (
    GATED_TUNED,
    TUNED,
    Problem,
    Tuning,
    default_tuning,
    gated_tuning,
    gated_tuning_of,
    is_usable,
    neighbours,
    tuning_of,
)

pytestmark = pytest.mark.unit

DOWN = Problem(("Q4_K",), 4096, 14336, 1)
GATED = Problem(("Q4_K", "Q4_K"), 28672, 4096, 1)
CUT = Tuning(lanes=32, split=4, rows=2, depth=2, passes=1, warps=8, min_blocks=2)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    yield
    TUNED.clear()
    GATED_TUNED.clear()


def test_what_was_kept_is_used(tmp_path: Path) -> None:
    cuts = TunedCuts("card", tmp_path)
    cuts.put(DOWN, [CUT, replace(CUT, min_blocks=3)], is_gated=False)
    pair = gated_tuning(GATED, 132, 90)
    cuts.put(GATED, [replace(pair, depth=pair.depth - 1)], is_gated=True)
    cuts.save()
    TunedCuts("another card", tmp_path).use(90)
    assert tuning_of(DOWN, 132, 90) == default_tuning(DOWN, 132, 90) != CUT
    TunedCuts("card", tmp_path).use(90)
    assert tuning_of(DOWN, 132, 90) == CUT and tuning_of(replace(DOWN, n_tokens=2), 132, 90) == replace(
        CUT, min_blocks=3
    )
    assert gated_tuning_of(GATED, 132, 90).depth == pair.depth - 1
    assert tuning_of(GATED, 132, 90) == default_tuning(GATED, 132, 90), "another kernel's"
    # numbers of tokens that were not measured add in the same order
    more = tuning_of(replace(DOWN, n_tokens=5), 132, 90)
    assert (more.lanes, more.split) == (CUT.lanes, CUT.split) and more.rows == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{}",
        '[{"gated": 0}]',
        '[{"gated": 0, "kinds": ["Q4_K"], "rows": 4096, "columns": 14336, "cuts": [[1]]}]',
    ],
)
def test_a_file_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    cuts = TunedCuts("card", tmp_path)
    cuts.path.write_text(text)
    TunedCuts("card", tmp_path).use(90)
    assert not TUNED and not GATED_TUNED


def test_cuts_that_no_kernel_has_or_that_add_differently_are_left_out(tmp_path: Path) -> None:
    wrong = [
        replace(CUT, lanes=7),
        replace(CUT, split=3),
        replace(CUT, depth=40),
        replace(CUT, rows=0),
        replace(CUT, passes=0),
    ]
    for bad in ([each] for each in wrong):
        cuts = TunedCuts("card", tmp_path)
        cuts.put(DOWN, bad, is_gated=False)
        cuts.put(replace(DOWN, n_rows=2048), [CUT, replace(CUT, split=2)], is_gated=False)
        cuts.save()
        TunedCuts("card", tmp_path).use(90)
        assert not TUNED


def test_neighbours_keep_the_number_of_warps_too() -> None:
    start = default_tuning(DOWN, 132, 90)
    found = list(neighbours(start, DOWN, 90))
    assert replace(start, rows=start.rows // 2, split=start.split // 2) in found
    assert all(is_usable(cut, DOWN, 90) for cut in found)
