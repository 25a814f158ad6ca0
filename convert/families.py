"""The families of models that can be converted."""

from __future__ import annotations

from pyinfer.convert.dense_families import BERT, GEMMA3, LLAMA, PHI3, QWEN2, QWEN3
from pyinfer.convert.expert_families import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from pyinfer.convert.family import Family
from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.errors import ConvertError

FAMILIES: tuple[Family, ...] = (LLAMA, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, GEMMA3, PHI3, BERT)


def family_of(checkpoint: HFCheckpoint) -> Family:
    """The family that the checkpoint's config names; ConvertError for an unknown one."""
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for family in FAMILIES:
        if name in family.hf_architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.hf_architectures)
    raise ConvertError(f"{checkpoint.folder}: architecture {name!r} cannot be converted; known: {known}")
