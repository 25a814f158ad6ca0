"""The merges of a tokenizer, taken apart and kept on disk: PYINFER_HOME/tokenizers.

Of all steps from a GGUF's lists to a byte-pair tokenizer, taking 150,000 "left right" strings apart is the one that reading
back beats, by three to four times. A stored form of the whole tokenizer takes longer to parse than the lists take to build.
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import sys
from pathlib import Path

from pyinfer.paths import tokenizers_dir
from pyinfer.quant.whole_file import whole_file

Pairs = list[tuple[str, str]]
_VERSION = f"1 {sys.version_info[:2]} {marshal.version}"  # of what is stored, and of how Python stores it
_LEAST = 20_000  # merges below which a file costs more than it saves
_MOST_FILES = 32  # of up to some megabytes each


def merge_pairs(merges: list[str], source: str) -> Pairs:
    """The two parts of every "left right" merge, best first. `source` identifies the file that they are from.

    The left part may itself begin with a space; of a merge named twice, the first place counts.
    """
    if len(merges) < _LEAST:
        return _take_apart(merges)
    path = tokenizers_dir() / f"{hashlib.sha256(f'{_VERSION} {source}'.encode()).hexdigest()[:32]}.merges"
    pairs = _read(path)
    if pairs is None:
        pairs = _take_apart(merges)
        # a folder that cannot be written (full disk, read-only home) only costs the next start its time
        with contextlib.suppress(OSError):
            _write(path, pairs)
    return pairs


def _take_apart(merges: list[str]) -> Pairs:
    return [(m[:at], m[at + 1 :]) for m in dict.fromkeys(merges) if (at := m.find(" ", 1)) > 0]


def _read(path: Path) -> Pairs | None:
    """What was written; None if that is not there or damaged."""
    try:
        blob = path.read_bytes()
        if hashlib.sha256(blob[32:]).digest() != blob[:32]:
            return None
        os.utime(path)  # it was used now
    except OSError:
        return None
    pairs: Pairs = marshal.loads(memoryview(blob)[32:])
    return pairs


def _write(path: Path, pairs: Pairs) -> None:
    one: dict[str, str] = {}  # equal strings become one object, which is stored once
    blob = marshal.dumps([(one.setdefault(left, left), one.setdefault(right, right)) for left, right in pairs])
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(hashlib.sha256(blob).digest() + blob)
    for old in sorted(path.parent.glob("*.merges"), key=lambda kept: kept.stat().st_mtime)[:-_MOST_FILES]:
        old.unlink(missing_ok=True)
