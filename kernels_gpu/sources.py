"""The texts of the `.cu` files, with the headers of this package put in place."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^[ \t]*#include "([\w.]+)"[^\n]*\n', re.MULTILINE)


@lru_cache(maxsize=256)
def with_includes(name: str) -> str:
    """The file's text with every `#include "x.cuh"` of this folder replaced by that file, once each.

    One self-contained text is what a cache can be keyed by. Other includes stay.
    """
    seen: set[str] = set()

    def expand(file: str) -> str:
        seen.add(file)

        def replace(match: re.Match[str]) -> str:
            included = match.group(1)
            if included in seen:
                return "\n"
            return expand(included) if (SOURCES / included).is_file() else match.group(0)

        text = (SOURCES / file).read_text("utf-8").replace("#pragma once\n", "\n")
        label = Path(file).name
        return f'#line 1 "{label}"\n' + _INCLUDE.sub(
            lambda match: replace(match) + f'#line {_line_after(match)} "{label}"\n', text
        )

    return expand(name)


def _line_after(match: re.Match[str]) -> int:
    return match.string.count("\n", 0, match.end()) + 1
