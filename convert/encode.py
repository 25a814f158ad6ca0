"""Rows of weights to rows of quantized bytes.

Types without a search get exactly the bytes that the codec in `quant` specifies; K types, and all types with
importances, get scales searched by `affine_search` and `signed_search`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyinfer.convert.encode_exact import exact_encoder
from pyinfer.errors import ModelError
from pyinfer.kernels_cpu.compiler import compiler_for
from pyinfer.kernels_cpu.isa import current_isa
from pyinfer.kernels_cpu.numba_code import numba_function
from pyinfer.quant.codec import ByteArray, Codec, FloatArray
from pyinfer.quant.codecs import codec_by_name

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_WEIGHTS_PER_TASK = 1 << 17  # a task's float32 stay in the L2 cache
_LEAST_IMPORTANCE = np.float32(1e-4)  # of the mean: no weight may become worthless
_EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_AFFINE = ("Q2_K", "Q4_K", "Q5_K")
_SIGNED = ("Q3_K", "Q6_K")
_NUMBA_SOURCES = ("*_search.py", "codes.py", "encode_*.py", "half_float.py", "importance.py", "jit.py", "lanes.py")
_BLOCK = 32
_F32 = codec_by_name("F32")


Run = Callable[[ByteArray, ByteArray], None]


@dataclass(frozen=True)
class RowEncoder:
    """`encoder(data, out)` fills bytes (n, row_bytes) from the source's (n, ...); any thread may call it.

    ModelError for weights that are not finite and do not fit the type.
    """

    row_bytes: int
    run: Run

    def __call__(self, data: ByteArray, out: ByteArray) -> None:
        self.run(data, out)


def encode(
    codec_name: str, rows: FloatArray, weights: FloatArray | None = None, n_threads: int | None = None
) -> ByteArray:
    """Bytes uint8 (n, row bytes) of float32 (n, columns), as `transcode`."""
    values = np.ascontiguousarray(rows, np.float32)
    return transcode(_F32, values.view(np.uint8), codec_name, weights, n_threads)


def transcode(
    source: Codec, data: ByteArray, codec_name: str, weights: FloatArray | None = None, n_threads: int | None = None
) -> ByteArray:
    """Bytes uint8 (n, row bytes) in another type of the bytes (n, row bytes of `source`), on `n_threads` threads.

    `weights` as in `row_encoder`. `n_threads` None takes all cores this process may use.
    """
    columns = data.shape[1] // source.block_bytes * source.block_size
    run = row_encoder(source, codec_name, columns, weights)
    out = np.empty((len(data), run.row_bytes), np.uint8)
    step = max(1, _WEIGHTS_PER_TASK // columns)
    tasks = [slice(i, i + step) for i in range(0, len(data), step)]
    if len(tasks) == 1:
        run(data, out)
    else:
        for _ in _threads(n_threads or usable_cores()).map(lambda rows: run(data[rows], out[rows]), tasks):
            pass
    return out


def row_encoder(source: Codec, codec_name: str, columns: int, weights: FloatArray | None = None) -> RowEncoder:
    """From rows of `columns` weights in the type `source` to another type.

    `weights` are the importances float32 (columns,) of the columns: the mean squares of their inputs. ModelError for
    rows that do not fill the type's blocks and for importances that make no sense.
    """
    codec = codec_by_name(codec_name)
    name, row_bytes = codec.name, codec.row_bytes(columns)
    importance = None if weights is None else _usable(weights, columns)
    if _is_exact(name, columns, importance is not None):
        run = _exact(name, source, columns)
    elif name in (*_EXACT, *_AFFINE, *_SIGNED):
        run = _searched(name, source, columns, importance)
    else:
        run = lambda data, out: np.copyto(out, codec.quantize(source.dequantize(data)))  # noqa: E731
    return RowEncoder(row_bytes, run)


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


def _is_exact(name: str, columns: int, weighted: bool) -> bool:
    if name in ("F16", "BF16"):
        return columns % _BLOCK == 0 and (name == "BF16" or current_isa().half)
    return name in _EXACT and (name == "Q8_0" or not weighted)


def _is_readable(source: Codec, columns: int) -> bool:
    """Whether vector code reads the type, infinities and NaN included."""
    return columns % _BLOCK == 0 and (source.name in ("F32", "BF16") or (source.name == "F16" and current_isa().half))


def _exact(name: str, source: Codec, columns: int) -> Run:
    is_direct = _is_readable(source, columns)
    encode_blocks = exact_encoder(name, source.name if is_direct else "F32")

    def run(data: ByteArray, out: ByteArray) -> None:
        rows = data if is_direct else source.dequantize(data)
        if not encode_blocks(rows.ctypes.data, out.ctypes.data, len(data) * columns // _BLOCK) and name in _EXACT:
            raise _not_finite(name)

    return run


def _searched(name: str, source: Codec, columns: int, importance: FloatArray | None) -> Run:
    search = _search_function(name)
    widen = exact_encoder("F32", source.name) if _is_readable(source, columns) else None

    def run(data: ByteArray, out: ByteArray) -> None:
        if widen is not None:
            values = np.empty((len(data), columns), np.float32)
            is_finite = widen(data.ctypes.data, values.ctypes.data, values.size // _BLOCK)
        else:
            values = source.dequantize(data)
            is_finite = bool(np.isfinite(values).all())
        if not is_finite:
            raise _not_finite(name)
        weights = 0 if importance is None else importance.ctypes.data
        search(values.ctypes.data, weights, out.ctypes.data, len(data), columns)

    return run


def _not_finite(name: str) -> ModelError:
    return ModelError(f"cannot quantize to {name}: a weight is NaN or infinite")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _threads(n_threads: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(n_threads, "pyinfer-encode")


@lru_cache(maxsize=32)
def _search_function(name: str) -> Callable[..., None]:
    """`search(x, columns, out, n_rows, n_columns)` of a type, of addresses; no columns: 0."""
    kind = "weighted" if name in _EXACT else "affine" if name in _AFFINE else "signed"
    function = f"encode_{name.lower()}"
    return numba_function(compiler_for(current_isa()), f"pyinfer.convert.encode_{kind}", function, 5, _numba_version())


@lru_cache(maxsize=1)
def _numba_version() -> str:
    """The cache of kernels knows the sources of its own folder only."""
    digest = hashlib.sha256()
    for pattern in _NUMBA_SOURCES:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
