"""How Numba code of this folder is compiled. `encode` imports it, once it has set the compile cache's place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import config

# where nothing can be kept Numba would refuse to compile: no place is set then
_IS_KEPT = bool(vars(config)["CACHE_DIR"])


def compiled(function: Callable[..., Any]) -> Any:
    """Machine code of a function, kept on disk; a disk without room for it only costs the next start its time."""
    dispatcher: Any = njit(nogil=True, error_model="numpy", cache=_IS_KEPT)(function)
    keep = dispatcher._cache.save_overload

    def keep_if_possible(signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            keep(signature, data)

    if _IS_KEPT:
        dispatcher._cache.save_overload = keep_if_possible
    return dispatcher
