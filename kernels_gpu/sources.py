"""The texts of the `.cu` files, with the headers of this package put in place."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
_DIRECTIVE = re.compile(r'[ \t]*#[ \t]*(?:include "(?P<file>[\w.]+)"|(?P<branch>if|ifdef|ifndef|elif|else|endif)\b)')


@lru_cache(maxsize=256)
def with_includes(name: str) -> str:
    """The file's text with every `#include "x.cuh"` of this folder replaced by that file, in guards of its own.

    One self-contained text is what a cache can be keyed by. Other includes stay.
    """
    return _expanded(name)


def _expanded(file: str) -> str:
    label = Path(file).name
    parts, open_branches = [f'#line 1 "{label}"\n'], list[bool]()  # whether files were put into an open #if so far
    text = (SOURCES / file).read_text("utf-8").replace("#pragma once\n", "\n")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        found = _DIRECTIVE.match(line)
        included, branch = (found["file"], found["branch"]) if found else (None, None)
        # the preprocessor does not see a #line in a branch that it leaves out
        is_moved = branch in ("elif", "else", "endif") and open_branches[-1]
        if included and (SOURCES / included).is_file():
            guard = f"PYINFER_{re.sub('[^A-Z0-9]', '_', included.upper())}"
            line = f"#ifndef {guard}\n#define {guard}\n{_expanded(included)}\n#endif\n"
            open_branches, is_moved = [True] * len(open_branches), True
        if branch in ("if", "ifdef", "ifndef"):
            open_branches.append(False)
        if branch == "endif":
            open_branches.pop()
        parts += [line, f'#line {number + 1} "{label}"\n'] if is_moved else [line]
    return "".join(parts)
