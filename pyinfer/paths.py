"""Where pyinfer keeps what it fetched or derived: `PYINFER_HOME` and the folders in it.

Default: `${XDG_CACHE_HOME:-~/.cache}/pyinfer` (XDG Base Directory specification: a relative
`XDG_CACHE_HOME` is ignored).
Nothing here creates a folder; whoever writes into one does.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The root of all caches, absolute; read from the environment at every call, so tests and users can move it."""
    chosen = os.environ.get("PYINFER_HOME", "")
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if xdg and os.path.isabs(xdg) else Path(os.path.expanduser("~")) / ".cache"
    return Path(os.path.abspath(base)) / "pyinfer"


def models_dir() -> Path:
    """Pulled models: NAME.gguf (or its shards) beside NAME.json."""
    return home() / "models"


def repack_dir() -> Path:
    """Repacked weights, if the user wants them kept."""
    return home() / "repack"


def kernels_dir() -> Path:
    """Compiled kernels, one folder per source hash and ISA."""
    return home() / "kernels"


def tokenizers_dir() -> Path:
    """Parts of tokenizers that are slow to make, a file a model."""
    return home() / "tokenizers"
