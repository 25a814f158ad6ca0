"""Kernels as one text: every line of it knows the file and the line that it came from, whatever branches are left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyinfer.kernels_gpu.sources import SOURCES, with_includes

pytestmark = pytest.mark.unit


def placed(text: str, defined: frozenset[str]) -> list[tuple[str, int, str]]:
    """File, line and text of what the preprocessor leaves; of conditions it knows #ifdef and #if with one name."""
    found, taken, file, number = list[tuple[str, int, str]](), [True], "", 0
    for line in text.splitlines():
        number += 1
        if match := re.match(r"\s*#\s*(ifdef|ifndef|if|else|elif|endif)\b\s*(\w*)", line):
            kind, name = match.groups()
            if kind in ("if", "ifdef", "ifndef"):
                taken.append(taken[-1] and (name in defined) == (kind != "ifndef"))
            elif kind == "endif":
                taken.pop()
            else:
                taken[-1] = taken[-2] and kind == "else" and not taken[-1]
        elif taken[-1] and (match := re.match(r'#line (\d+) "(.+)"', line)):
            number, file = int(match[1]) - 1, match[2]
        elif taken[-1]:
            found.append((file, number, line))
    return found


@pytest.mark.parametrize("defined", [frozenset(), frozenset({"HEAD", "FUSED", "ACTIVATION"})])
@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_lines_keep_their_places(path: Path, defined: frozenset[str]) -> None:
    lines = {each.name: each.read_text().splitlines() for each in SOURCES.iterdir() if each.is_file()}
    left = placed(with_includes(path.name), defined)
    assert len(left) > 5
    for file, number, line in left:
        if line.strip() and not line.startswith("#define PYINFER_"):
            assert lines[file][number - 1] == line, (file, number)
