"""From a GGUF to a smaller one: every tensor gets its type by the plan, and is made while it is written.

What is decided (types, sizes, metadata) is decided before a byte is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyinfer.convert.encode import usable_cores
from pyinfer.convert.file_types import FileType, file_type
from pyinfer.convert.importance_matrix import ImportanceMatrix
from pyinfer.convert.pipeline import TensorJob, write_tensors
from pyinfer.convert.type_plan import (
    QUANTIZED_TYPES,
    PlannedType,
    PlanOptions,
    TensorSpec,
    is_quantizable,
    model_shape,
    plan_types,
)
from pyinfer.convert.writing import writing
from pyinfer.errors import ConvertError
from pyinfer.quant.codec import FloatArray
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.tensor import QuantTensor
from pyinfer.quant.writer import gguf_file

_QUANTIZATION_VERSION = 2  # of ggml's block layouts
_SHARD_KEYS = ("split.no", "split.count", "split.tensors.count")
_NO_IMATRIX = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Quantization:
    """A quantized file that can be written."""

    source: GGUFFile
    target: FileType
    types: dict[str, PlannedType]
    metadata: dict[str, Any]
    tensors: dict[str, TensorJob]
    n_threads: int

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def n_source_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.source.tensors.values())

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_elements for tensor in self.source.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_parameters

    @property
    def fallbacks(self) -> dict[str, PlannedType]:
        """Tensors whose rows do not fill the blocks of the type the mix wants."""
        return {name: planned for name, planned in self.types.items() if planned.is_fallback}

    def made(self, file: GGUFFile, extra: Mapping[str, Any]) -> Quantization:
        """The same with more metadata, its tensors copied from a file that was written before."""
        tensors = {name: replace(job, source=file.tensors[name]) for name, job in self.tensors.items()}
        return replace(self, metadata={**self.metadata, **extra}, tensors=tensors)

    def write(
        self, path: Path, on_bytes: Callable[[int], None] = lambda done: None, *, name: Path | None = None
    ) -> None:
        """Write the file whole or not at all; `on_bytes` is told the bytes of tensors so far.

        `name` is what errors call the file, if not by its path.
        """
        if path.resolve() == self.source.path.resolve():
            raise ConvertError(f"{path}: is the model itself; write to another file", param="output")
        with writing(name or path), gguf_file(path, self.metadata, self.tensors) as (file, offsets):
            write_tensors(file, offsets, self.tensors, self.n_threads, on_bytes)


def plan_quantization(
    source: GGUFFile,
    type_name: str,
    options: PlanOptions | None = None,
    *,
    imatrix: ImportanceMatrix | None = None,
    allow_requantize: bool = False,
    n_threads: int | None = None,
) -> Quantization:
    """Choose every tensor's type. Reads no weights.

    ConvertError for a tensor that would be quantized twice without `allow_requantize`, and for an imatrix that is not
    of this model or missing where the type is worthless without one.
    """
    target = file_type(type_name)
    options = replace(options or PlanOptions(), has_imatrix=imatrix is not None)
    specs = [TensorSpec(t.name, t.shape, t.codec.name) for t in source.tensors.values()]
    types = plan_types(specs, target, model_shape(source.metadata), options)
    jobs: dict[str, TensorJob] = {}
    for tensor in source.tensors.values():
        codec, columns = types[tensor.name].codec, None
        if codec != tensor.codec.name:
            _check_source(tensor, codec, allow_requantize)
            columns = None if imatrix is None else _columns(tensor, imatrix)
            if columns is None and target.name == "Q2_K_S" and codec == "Q2_K" and tensor.name not in _NO_IMATRIX:
                raise ConvertError(f"tensor {tensor.name}: Q2_K_S is garbage without importances; give --imatrix")
        jobs[tensor.name] = TensorJob(codec, tensor.shape, tensor, columns)
    metadata = _metadata(source, target, imatrix)
    return Quantization(source, target, types, metadata, jobs, n_threads or usable_cores())


def _metadata(source: GGUFFile, target: FileType, imatrix: ImportanceMatrix | None) -> dict[str, Any]:
    metadata = {key: value for key, value in source.metadata.items() if key not in _SHARD_KEYS}
    metadata |= {"general.quantization_version": _QUANTIZATION_VERSION, "general.file_type": target.file_type_id}
    if imatrix is not None:
        metadata["quantize.imatrix.file"] = Path(imatrix.path).name
        if imatrix.datasets:
            metadata["quantize.imatrix.dataset"] = imatrix.datasets[0]
        metadata["quantize.imatrix.entries_count"] = len(imatrix.sums)
        if imatrix.n_chunks:
            metadata["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    return metadata


def _check_source(tensor: QuantTensor, codec: str, allow_requantize: bool) -> None:
    name = tensor.codec.name
    if not tensor.codec.supported:
        raise ConvertError(f"tensor {tensor.name} is {name}, which this version cannot read")
    if not is_quantizable(tensor.name, tensor.shape):
        raise AssertionError(tensor.name)
    if name in QUANTIZED_TYPES and not allow_requantize:
        raise ConvertError(
            f"tensor {tensor.name} is {name} already, and quantizing it to {codec} loses more than quantizing the "
            "original would; start from an F32, F16 or BF16 file, or give --allow-requantize"
        )


def _columns(tensor: QuantTensor, imatrix: ImportanceMatrix) -> FloatArray | None:
    columns = imatrix.columns(tensor.name)
    n_matrices = math.prod(tensor.shape[:-2])
    if columns is None or tensor.name in _NO_IMATRIX[:2]:
        return None
    if columns.shape != (n_matrices, tensor.shape[-1]):
        raise ConvertError(
            f"tensor {tensor.name}: the imatrix has {columns.shape[0]} x {columns.shape[1]} columns, the model "
            f"{n_matrices} x {tensor.shape[-1]}; it was made with another model"
        )
    return columns
