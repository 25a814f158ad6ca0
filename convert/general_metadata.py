"""What a checkpoint says about itself - name, authors, licence, sampling defaults, pooling - as GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.errors import ConvertError

_QUANTIZATION_VERSION = 2  # of ggml's block layouts
_MEAN, _CLS, _LAST = 1, 2, 3  # `pooling_type`
_POOLINGS = {
    "pooling_mode_mean_tokens": _MEAN,
    "pooling_mode_cls_token": _CLS,
    "pooling_mode_lasttoken": _LAST,
}
_POOLING_NAMES = {"mean": _MEAN, "cls": _CLS, "lasttoken": _LAST}


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """The weights of a model, told apart as a size label such as '8x7B' does."""

    total: int
    shared: int  # outside of experts
    one_expert: int  # of every layer
    n_experts: int = 0


def general_metadata(checkpoint: HFCheckpoint, counts: ParameterCounts, name: str | None) -> dict[str, Any]:
    """Keys `general.*` but for the architecture: from the model card, `generation_config.json` and the folder's name.

    The reading is gguf-py's, whose heuristics llama.cpp's converter uses, so that both write the same.
    """
    import gguf

    try:
        card = gguf.Metadata.load(None, checkpoint.folder.resolve(), name, counts.total)
    except Exception as error:  # YAML errors of the model card and whatever else its heuristics meet
        raise ConvertError(
            f"{checkpoint.folder}: the model card (README.md) cannot be read: {' '.join(str(error).split())}; "
            "correct it or remove it"
        ) from None
    card.name = card.name or checkpoint.folder.resolve().name
    card.size_label = card.size_label or gguf.size_label(
        counts.total, counts.shared, counts.one_expert, counts.n_experts
    )
    writer = gguf.GGUFWriter(None, "")
    writer.add_type(gguf.GGUFType.MODEL)
    card.set_gguf_meta_model(writer)
    values = writer.kv_data[0]
    for key, entry in values.items():
        is_number = isinstance(entry.value, int | float) and abs(entry.value) < 2**31
        if key.startswith("general.sampling.") and key != "general.sampling.sequence" and not is_number:
            raise ConvertError(
                f"{checkpoint.folder / 'generation_config.json'}: {key[17:]} is {entry.value!r}, no number"
            )
    signed = gguf.GGUFValueType.INT32
    metadata = {
        key: np.int32(entry.value) if entry.type == signed else entry.value
        for key, entry in values.items()
        if key != "general.architecture"
    }
    return metadata | {"general.quantization_version": _QUANTIZATION_VERSION}


def pooling_metadata(checkpoint: HFCheckpoint, arch: str) -> dict[str, Any]:
    """`<arch>.pooling_type` of a sentence-transformers folder; nothing without its `modules.json`."""
    import json

    if not checkpoint.has("modules.json"):
        return {}
    try:
        modules = json.loads(checkpoint.text("modules.json"))
        path = next((str(m["path"]) for m in modules if str(m["type"]).endswith("Pooling")), None)
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{checkpoint.folder / 'modules.json'}: cannot be read: {error!r}") from None
    if path is None:
        return {}
    pooling = checkpoint.json(f"{path}/config.json")
    kinds = [kind for key, kind in _POOLINGS.items() if pooling.get(key)]
    kinds += [kind for name, kind in _POOLING_NAMES.items() if pooling.get("pooling_mode") == name]
    if not kinds:
        raise ConvertError(f"{checkpoint.folder / path}: pooling is not by mean, CLS or last token, which GGUF knows")
    return {f"{arch}.pooling_type": kinds[0]}
