"""The texts of the `.cu` files, with the headers of this package put in place."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^[ \t]*#include "([\w.]+)"[^\n]*\n', re.MULTILINE)


@lru_cache(maxsize=256)
def with_includes(name: str) -> str:
    """The file's text with every `#include "x.cuh"` of this folder replaced by that file, in guards of its own.

    One self-contained text is what a cache can be keyed by. Other includes stay.
    """
    return _expanded(name)


def _expanded(file: str) -> str:
    label = Path(file).name

    def replace(match: re.Match[str]) -> str:
        included = match.group(1)
        if not (SOURCES / included).is_file():
            return match.group(0)
        guard = f"PYINFER_{re.sub('[^A-Z0-9]', '_', included.upper())}"
        inner = f"#ifndef {guard}\n#define {guard}\n{_expanded(included)}\n#endif\n"
        return f'{inner}#line {_line_after(match)} "{label}"\n'

    text = (SOURCES / file).read_text("utf-8").replace("#pragma once\n", "\n")
    return f'#line 1 "{label}"\n' + _INCLUDE.sub(replace, text)


def _line_after(match: re.Match[str]) -> int:
    return match.string.count("\n", 0, match.end()) + 1
