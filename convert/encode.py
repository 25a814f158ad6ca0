"""Rows of weights to rows of quantized bytes, on all threads.

Types without a search get exactly the bytes that the codec in `quant` specifies; K types, and all types with
importances, get scales searched by `affine_search` and `signed_search`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pyinfer.errors import ModelError
from pyinfer.kernels_cpu.compiler import cache_folder
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.quant.codec import ByteArray, Codec, FloatArray
from pyinfer.quant.codecs import codec_by_name

_WEIGHTS_PER_TASK = 1 << 17  # a task's float32 stay in the L2 cache
_LEAST_IMPORTANCE = np.float32(1e-4)  # of the mean: no weight may become worthless
_EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_AFFINE = ("Q2_K", "Q4_K", "Q5_K")
_SIGNED = ("Q3_K", "Q6_K")
_NUMBA_SOURCES = ("*_search.py", "codes.py", "encode_*.py", "half_float.py", "importance.py", "jit.py", "lanes.py")
_BLOCK = 32
_EMPTY = np.empty(0, np.float32)


def encode(
    codec_name: str, rows: FloatArray, weights: FloatArray | None = None, n_threads: int | None = None
) -> ByteArray:
    """Bytes uint8 (n, row bytes) of float32 (n, columns), as `transcode`."""
    values = np.ascontiguousarray(rows, np.float32)
    return transcode(codec_by_name("F32"), values.view(np.uint8), codec_name, weights, n_threads)


def transcode(
    source: Codec, data: ByteArray, codec_name: str, weights: FloatArray | None = None, n_threads: int | None = None
) -> ByteArray:
    """Bytes uint8 (n, row bytes) in another type of the bytes (n, row bytes of `source`).

    `weights` are the importances float32 (columns,) of the columns: the mean squares of their inputs. `n_threads` None
    takes all cores this process may use. ModelError for weights that are not finite and do not fit the type.
    """
    codec = codec_by_name(codec_name)
    columns = data.shape[1] // source.block_bytes * source.block_size
    out = np.empty((len(data), codec.row_bytes(columns)), np.uint8)
    importance = _EMPTY if weights is None else _usable(weights, columns)
    kernel = _kernel(codec, columns, weighted=weights is not None)

    def run(rows: slice) -> None:
        values = data[rows].view(np.float32) if source.name == "F32" else source.dequantize(data[rows])
        kernel(values, importance, out[rows])

    step = max(1, _WEIGHTS_PER_TASK // columns)
    tasks = [slice(i, i + step) for i in range(0, len(data), step)]
    if len(tasks) == 1:
        run(tasks[0])
    else:
        for _ in _threads(n_threads or _cores()).map(run, tasks):
            pass
    return out


def _usable(weights: FloatArray, columns: int) -> FloatArray:
    """Importances scaled to a mean of 1, none of them zero; all alike if the columns were never used."""
    if weights.shape != (columns,):
        raise ModelError(f"importances are of shape {weights.shape}, but the rows have {columns} columns")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ModelError("an importance is negative, NaN or infinite; make the importance matrix anew")
    mean = weights.mean(dtype=np.float64)
    if mean <= 0:
        return np.ones(columns, np.float32)
    usable: FloatArray = np.maximum(weights / mean, _LEAST_IMPORTANCE).astype(np.float32)
    return usable


Kernel = Callable[[FloatArray, FloatArray, ByteArray], None]


def _kernel(codec: Codec, columns: int, weighted: bool) -> Kernel:
    """Fills bytes (n, row bytes) from float32 (n, columns) and importances (columns,) or (0,)."""
    name = codec.name
    if columns % _BLOCK == 0 and (name == "BF16" or (name == "F16" and current_isa().half)):
        return _exact(name)
    if name in _EXACT and (name == "Q8_0" or not weighted):
        return _exact(name)
    if name in (*_EXACT, *_AFFINE, *_SIGNED):
        return _searched(name)
    return lambda rows, _, out: np.copyto(out, codec.quantize(rows))


def _exact(name: str) -> Kernel:
    from pyinfer.convert.encode_exact import exact_encoder

    run = exact_encoder(name)

    def encode_rows(rows: FloatArray, _: FloatArray, out: ByteArray) -> None:
        if not run(rows.ctypes.data, out.ctypes.data, rows.size // _BLOCK) and name in _EXACT:
            raise _not_finite(name)

    return encode_rows


def _searched(name: str) -> Kernel:
    kind = "weighted" if name in _EXACT else "affine" if name in _AFFINE else "signed"
    search = _compiled(f"encode_{kind}", f"encode_{name.lower()}")

    def encode_rows(rows: FloatArray, columns: FloatArray, out: ByteArray) -> None:
        if not np.isfinite(rows).all():
            raise _not_finite(name)
        # Numba would compile everything once more for arrays that are read-only
        search(rows if rows.flags.writeable else rows.copy(), columns, out)

    return encode_rows


def _not_finite(name: str) -> ModelError:
    return ModelError(f"cannot quantize to {name}: a weight is NaN or infinite")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _threads(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "pyinfer-encode")


@lru_cache(maxsize=32)
def _compiled(module: str, function: str) -> Any:
    """A Numba function of this folder; its machine code is kept on disk if that can be."""
    from numba.core import config

    settings = vars(config)
    before = settings["CACHE_DIR"]
    settings["CACHE_DIR"] = _cache_place()
    try:
        return getattr(importlib.import_module(f"pyinfer.convert.{module}"), function)
    finally:
        settings["CACHE_DIR"] = before


@lru_cache(maxsize=1)
def _cache_place() -> str:
    """A folder named after the sources, for Numba looks only at the one that defines a function; "" if none can be."""
    digest = hashlib.sha256()
    for pattern in _NUMBA_SOURCES:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.read_bytes())
    folder = cache_folder(current_isa()) / f"numba-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return os.fspath(folder) if os.access(folder, os.W_OK) else ""
