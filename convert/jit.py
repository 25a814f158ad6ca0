"""How Numba code of this folder is compiled. `encode` imports it, once it has set the compile cache's place."""

from __future__ import annotations

from numba import njit
from numba.core import config

# where nothing can be kept Numba would refuse to compile: no place is set then
compiled = njit(nogil=True, error_model="numpy", cache=bool(vars(config)["CACHE_DIR"]))
