"""Importance matrices in llama.cpp's GGUF form: sums of squared inputs of every matrix, by column.

A matrix `NAME` has two tensors: `NAME.in_sum2` (matrices, columns) and `NAME.counts` (matrices, 1), the number of input
rows that were summed. More than one matrix is a tensor of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyinfer.convert.writing import writing
from pyinfer.errors import ConvertError
from pyinfer.quant.codec import FloatArray
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.writer import write_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a model did with a text."""

    sums: Mapping[str, FloatArray]  # of a tensor's name: float32 (matrices, columns)
    counts: Mapping[str, FloatArray]  # float32 (matrices,)
    datasets: tuple[str, ...]  # names of the texts
    n_chunks: int
    chunk_size: int  # tokens
    path: str = ""  # where it was read from

    def columns(self, name: str) -> FloatArray | None:
        """Mean squares float32 (matrices, columns) of a tensor's inputs, None if it has none; 1 for an unused expert."""
        if name not in self.sums:
            return None
        counts = self.counts[name][:, None]
        return np.where(counts > 0, self.sums[name] / np.maximum(counts, 1), np.float32(1))

    @classmethod
    def load(cls, path: str | Path) -> ImportanceMatrix:
        """Read a file that `save`, or llama-imatrix, has written; ConvertError says what is wrong with it."""
        with GGUFFile.open(path) as file:
            if file.get("general.type", "") != "imatrix" and "imatrix.datasets" not in file.metadata:
                raise ConvertError(f"{path}: is a GGUF but no importance matrix; make one with 'pyinfer imatrix'")
            sums: dict[str, FloatArray] = {}
            counts: dict[str, FloatArray] = {}
            for full_name, tensor in file.tensors.items():
                if not full_name.endswith(_SUMS):
                    continue
                name = full_name.removesuffix(_SUMS)
                count = file.tensors.get(name + _COUNTS)
                if count is None or tensor.codec.name != "F32" or count.codec.name != "F32":
                    raise ConvertError(f"{path}: {full_name} is not float32 or has no {name}{_COUNTS}")
                counts[name] = count.dequantize().ravel()
                sums[name] = tensor.dequantize().reshape(counts[name].size, -1)
                if not (np.isfinite(sums[name]).all() and (sums[name] >= 0).all() and np.isfinite(counts[name]).all()):
                    raise ConvertError(f"{path}: {full_name} holds a negative or infinite number; make the file anew")
            if not sums:
                raise ConvertError(f"{path}: holds no importances")
            return cls(
                sums,
                counts,
                tuple(file.get("imatrix.datasets", [])),
                int(file.get("imatrix.chunk_count", 0)),
                int(file.get("imatrix.chunk_size", 0)),
                str(path),
            )

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": list(self.datasets),
            "imatrix.chunk_count": self.n_chunks,
            "imatrix.chunk_size": self.chunk_size,
        }
        tensors = {}
        for name in sorted(self.sums):
            sums, counts = self.sums[name], self.counts[name].reshape(-1, 1)
            tensors[name + _SUMS] = ("F32", sums.shape, np.ascontiguousarray(sums).view(np.uint8))
            tensors[name + _COUNTS] = ("F32", counts.shape, np.ascontiguousarray(counts).view(np.uint8))
        with writing(path):
            write_gguf(path, metadata, tensors)
