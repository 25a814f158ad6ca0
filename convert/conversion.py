"""From a Hugging Face checkpoint to a GGUF: everything is planned first, then tensors are made while they are written.

Names and transforms come from `pyinfer.convert.families`, types from `pyinfer.convert.type_plan`. No more than a chunk
of one tensor is in memory.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyinfer.convert.families import family_of
from pyinfer.convert.family import Family, TensorRule
from pyinfer.convert.file_types import FileType, file_type
from pyinfer.convert.general_metadata import ParameterCounts, general_metadata, pooling_metadata
from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.hf_config import HFConfig
from pyinfer.convert.safetensors import StoredTensor
from pyinfer.convert.stacked_tensor import StackedTensor
from pyinfer.convert.tensor_source import TensorSource
from pyinfer.convert.type_plan import TensorSpec, model_shape, plan_types
from pyinfer.convert.vocabulary import vocabulary_metadata
from pyinfer.convert.writing import writing
from pyinfer.errors import ConvertError
from pyinfer.quant.writer import TensorStream, stream_gguf

_WITHOUT_WINDOW = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")


@dataclass(frozen=True)
class Conversion:
    """A GGUF that can be written: the file's type, all metadata, and tensors in the order of the file."""

    file_type: FileType
    metadata: dict[str, Any]
    tensors: dict[str, TensorStream]
    notes: tuple[str, ...]  # what the checkpoint holds and the file does not

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def write(self, path: Path, on_bytes: Callable[[int], None] = lambda done: None) -> None:
        """Write the file whole or not at all; `on_bytes` is told the bytes of tensors so far."""
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else None
        if free is None:
            raise ConvertError(f"{path.parent}: is no folder to write to; make it first", param="output")
        if path.is_dir():
            raise ConvertError(f"{path}: is a folder; name the file to write", param="output")
        if free < self.n_bytes:
            raise ConvertError(
                f"{path}: needs {self.n_bytes:,} bytes and the disk has {free:,} free; free some or write elsewhere"
            )
        with writing(path):
            stream_gguf(path, self.metadata, self.tensors, on_bytes=on_bytes)


def plan_conversion(
    folder: str | Path, type_name: str = "auto", *, name: str | None = None, pre_tokenizer: str | None = None
) -> Conversion:
    """Read everything but the weights. `type_name`: a file type such as 'q4_k_m', or 'auto' for the checkpoint's own.

    ConvertError names what is missing, unknown or not expressible in GGUF.
    """
    checkpoint = HFCheckpoint(folder)
    family = family_of(checkpoint)
    config = family.config(checkpoint.config)
    family.check(config)
    _check_sizes(checkpoint, config)
    target = file_type(_own_type(checkpoint) if type_name.lower() == "auto" else type_name)
    model = {
        "general.architecture": family.arch,
        **family.metadata(config),
        **pooling_metadata(checkpoint, family.arch),
        "general.file_type": target.file_type_id,
    }
    notes: list[str] = []
    vocabulary = vocabulary_metadata(checkpoint, family, config, pre_tokenizer, notes)
    n_vocab = len(vocabulary["tokenizer.ggml.tokens"])
    sources = _sources(checkpoint, family, config, n_vocab, notes)
    specs = [TensorSpec(tensor, source.shape, "F32") for tensor, source in sources.items()]
    types = plan_types(specs, target, model_shape(model))
    tensors = {
        tensor: TensorStream(types[tensor].codec, source.shape, functools.partial(source.chunks, types[tensor].codec))
        for tensor, source in sources.items()
    }
    general = general_metadata(checkpoint, _parameter_counts(sources), name)
    notes += _window_notes(family, config)
    return Conversion(target, {**model, **general, **vocabulary}, tensors, tuple(notes))


def _parameter_counts(sources: Mapping[str, TensorSource]) -> ParameterCounts:
    sizes = {name: (source.shape, math.prod(source.shape)) for name, source in sources.items()}
    experts = [(shape[0], size) for name, (shape, size) in sizes.items() if "_exps." in name]
    total, in_experts = sum(size for _, size in sizes.values()), sum(size for _, size in experts)
    one_each = sum(size // count for count, size in experts)
    return ParameterCounts(total, total - in_experts, one_each, experts[0][0] if experts else 0)


def _check_sizes(checkpoint: HFCheckpoint, config: HFConfig) -> None:
    """Numbers of the config that work is done by must fit the tensors that are there."""
    tensors = checkpoint.tensors.values()
    limits = {
        **dict.fromkeys(("num_hidden_layers", "num_local_experts", "num_experts"), len(tensors)),
        "vocab_size": max((max(t.shape, default=0) for t in tensors), default=0),
    }
    for key, limit in limits.items():
        if config.get(key) is not None and config.integer(key) > limit:
            raise ConvertError(
                f"config.json: {key!r} is {config.get(key)}, and the tensors allow for {limit} at most; take the "
                "config.json that belongs to this checkpoint"
            )


def _own_type(checkpoint: HFCheckpoint) -> str:
    """The type of the first matrix; float16 for checkpoints in float32, as llama.cpp has it."""
    first = next((t for t in checkpoint.tensors.values() if len(t.shape) >= 2), None)
    return "bf16" if first is not None and first.dtype == "BF16" else "f16"


def _sources(
    checkpoint: HFCheckpoint, family: Family, config: HFConfig, n_vocab: int, notes: list[str]
) -> dict[str, TensorSource]:
    """The tensors of the GGUF in the order of the family's table; every tensor of the checkpoint is accounted for."""
    stored = _renamed(checkpoint, family, notes)
    sources = {name: TensorSource(values.shape, values=values) for name, values in family.extra_tensors(config).items()}
    architecture = str(checkpoint.config["architectures"][0])
    has_head = not config.get("tie_word_embeddings") and not architecture.endswith("Model")
    n_experts = family.n_experts(config)

    def take(name: str) -> StoredTensor:
        tensor = stored.pop(name, None)
        if tensor is None:
            raise ConvertError(f"{checkpoint.folder}: tensor {name} is missing; fetch the checkpoint again")
        return tensor

    for source, rule in _expanded(family, config.integer("num_hidden_layers")):
        if rule.target == "output" and not has_head:
            stored.pop(f"{source}.weight", None)
            continue
        if "{e}" in source:
            parts = [take(f"{source}.weight".replace("{e}", str(e))) for e in range(n_experts)]
            sources[f"{rule.target}.weight"] = _stacked(f"{source}.weight", parts)
            continue
        weight = take(f"{source}.weight")
        sources[f"{rule.target}.weight"] = _source(weight, rule, config, n_vocab)
        bias = stored.pop(f"{source}.bias", None)
        if bias is not None:
            sources[f"{rule.target}.bias"] = _source(bias, rule, config, n_vocab, is_bias=True)
    if stored:
        more = f" (and {len(stored) - 1} more)" if len(stored) > 1 else ""
        raise ConvertError(
            f"{checkpoint.folder}: tensor {next(iter(stored))}{more} is not part of a {family.arch} model in GGUF"
        )
    return sources


def _renamed(checkpoint: HFCheckpoint, family: Family, notes: list[str]) -> dict[str, StoredTensor]:
    """The checkpoint's tensors under the names of the family's table, without those that a GGUF has no use for."""
    renamed: dict[str, StoredTensor] = {}
    n_ignored = 0
    for name, tensor in checkpoint.tensors.items():
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        if any(re.search(pattern, name) for pattern in family.ignored):
            n_ignored += 1
            continue
        if name in renamed:
            raise ConvertError(f"{checkpoint.folder}: tensors {renamed[name].name} and {tensor.name} are the same one")
        renamed[name] = tensor
    if n_ignored:
        notes.append(f"{n_ignored} tensors of the checkpoint are not part of the text model and are left out")
    return renamed


def _expanded(family: Family, n_layers: int) -> Iterator[tuple[str, TensorRule]]:
    """The rules with layer numbers filled in, layer by layer where the table's layer rules stand."""
    rules = list(family.tensors.items())
    layered = [(source, rule) for source, rule in rules if "{i}" in source]
    first = rules.index(layered[0])
    yield from ((s, r) for s, r in rules[:first] if "{i}" not in s)
    for i in range(n_layers):
        for source, rule in layered:
            target = rule.target.replace("{i}", str(i))
            yield source.replace("{i}", str(i)), TensorRule(target, rule.order, rule.offset)
    yield from ((s, r) for s, r in rules[first:] if "{i}" not in s)


def _stacked(name: str, parts: list[StoredTensor]) -> TensorSource:
    tensor = StackedTensor.of(name, parts)
    if len(tensor.shape) != 3 or 0 in tensor.shape:
        raise ConvertError(f"{tensor.path.name}: tensor {parts[0].name} has shape {parts[0].shape}; expected a matrix")
    assert tensor.codec.can_quantize
    return TensorSource(tensor.shape, tensor)


def _source(
    stored: StoredTensor, rule: TensorRule, config: HFConfig, n_vocab: int, is_bias: bool = False
) -> TensorSource:
    shape = stored.shape
    if len(shape) not in ((1,) if is_bias else (1, 2)) or 0 in shape:
        raise ConvertError(f"{stored.path.name}: tensor {stored.name} has shape {shape}; expected a vector or a matrix")
    assert stored.codec.can_quantize
    if rule.target in ("token_embd", "output") and shape[0] != n_vocab:
        if shape[0] < n_vocab:
            raise ConvertError(
                f"{stored.path.name}: tensor {stored.name} has {shape[0]} rows for {n_vocab} tokens; take the "
                "tokenizer and config.json that belong to this checkpoint"
            )
        shape = (n_vocab, *shape[1:])  # rows beyond the vocabulary stand for nothing
    if rule.target == "token_embd" and shape[-1] != config.integer("hidden_size"):
        raise ConvertError(
            f"{stored.path.name}: tensor {stored.name} has {shape[-1]} columns and config.json's 'hidden_size' is "
            f"{config.get('hidden_size')}; take the config.json that belongs to this checkpoint"
        )
    order = None if rule.order is None else rule.order(config, shape[0])
    return TensorSource(shape, stored, order, 0.0 if is_bias else rule.offset)


def _window_notes(family: Family, config: HFConfig) -> list[str]:
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window") is not False
    if family.arch in _WITHOUT_WINDOW and isinstance(window, int) and is_used:
        context = config.get("max_position_embeddings")
        if isinstance(context, int) and window < context:
            return [f"GGUF's {family.arch} has no sliding window: tokens will see more than the last {window}"]
    return []
