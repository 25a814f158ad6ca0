"""What goes into every matrix of a model over a text: sums of squared inputs, by column.

Runs the NumPy interpreter in float32; a matrix is dequantized when it is needed, so memory stays that of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ModelError
from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch, Int32
from pyinfer.graph.passes import for_context
from pyinfer.graph.reference import ReferenceStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.tensor import QuantTensor
from pyinfer.runtime.models.registry import build_graph

_TOKENS_AT_ONCE = 4096  # each batch dequantizes every weight once
_PAGE = 16

F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class ActivationSums:
    """Sums over all tokens seen so far, by name of the tensor: one matrix, or one of each expert."""

    def __init__(self) -> None:
        self.squares: dict[str, F64Array] = {}  # (matrices, columns)
        self.n_rows: dict[str, Counts] = {}  # (matrices,)
        self._input: tuple[F32Array, Int32 | None] | None = None  # the last one, and its sums
        self._sums: tuple[F64Array, Counts] = np.empty((0, 0)), np.empty(0, np.int64)
        self._counted: set[str] = set()  # the tensors that these were added for

    def add(self, weight: QuantTensor, rows: F32Array, experts: Int32 | None = None) -> None:
        """`experts` [n_rows, n_used] are those that the rows, or each slot of them, go to."""
        if self._input is None or self._input[0] is not rows or self._input[1] is not experts:
            # matrices side by side, such as q, k and v, share their input
            self._input, self._counted = (rows, experts), set()
            self._sums = _sums(rows) if experts is None else _expert_sums(rows, experts, weight)
        name = weight.name
        if name in self._counted:  # another part of the same matrix
            return
        self._counted.add(name)
        squares, n_rows = self._sums
        self.squares[name] = self.squares.get(name, 0.0) + squares
        self.n_rows[name] = self.n_rows.get(name, 0) + n_rows


def _sums(rows: F32Array) -> tuple[F64Array, Counts]:
    return np.einsum("ij,ij->j", rows, rows, dtype=np.float64)[np.newaxis], np.array([len(rows)])


def _expert_sums(rows: F32Array, experts: Int32, weight: QuantTensor) -> tuple[F64Array, Counts]:
    n_experts, _, n_in = weight.shape
    slots = np.broadcast_to(rows.reshape(len(rows), rows.shape[1] // n_in, n_in), (*experts.shape, n_in))
    squares, n_rows = np.zeros((n_experts, n_in)), np.zeros(n_experts, np.int64)
    for expert in np.unique(experts):
        squares[expert], n_rows[expert] = (part[0] for part in _sums(slots[experts == expert]))
    return squares, n_rows


def activation_sums(
    file: GGUFFile, chunks: Sequence[Sequence[int]], on_chunk: Callable[[int], None] = lambda done: None
) -> ActivationSums:
    """Run chunks of token ids, all of one length, each by itself; ModelError if an input is not finite."""
    length = len(chunks[0])
    graph = for_context(build_graph(file), length)
    n_pages = -(-length // _PAGE)
    step = max(1, _TOKENS_AT_ONCE // length)
    config = StageConfig(
        n_pages=len(graph.kv_groups) * step * n_pages,
        block_size=_PAGE,
        kv_dtype="f32",
        max_tokens=step * length,
        max_sequences=step,
        n_ctx=length,
    )
    sums = ActivationSums()
    stage = ReferenceStage(graph, config, keep_weights=False)
    try:
        for first in range(0, len(chunks), step):
            part = chunks[first : first + step]
            stage.observe(_batch(part, n_pages, len(graph.kv_groups)), sums.add)
            on_chunk(first + len(part))
    finally:
        stage.close()
    for name, values in sums.squares.items():
        if not np.isfinite(values).all():
            raise ModelError(f"{file.path.name}: an input of {name} is NaN or infinite; the file is damaged")
    return sums


def _batch(chunks: Sequence[Sequence[int]], n_pages: int, n_groups: int) -> Batch:
    n, length = len(chunks), len(chunks[0])
    tables = np.arange(n_groups * n * n_pages, dtype=np.int32).reshape(n_groups, n, n_pages)
    positions = np.arange(length, dtype=np.int32)
    slots = tables[:, :, positions // _PAGE] * _PAGE + positions % _PAGE
    return Batch(
        token_ids=np.array(chunks, np.int32).ravel(),
        positions=np.tile(positions, n),
        slots=slots.astype(np.int32).reshape(n_groups, -1),
        sequence_starts=np.arange(0, (n + 1) * length, length, dtype=np.int32),
        page_tables=tables,
        output_rows=np.arange(n * length, dtype=np.int32),
    )
