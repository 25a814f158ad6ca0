"""What a whole file can be quantized to: llama.cpp's file types, each with the type most of its tensors get."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from pyinfer.errors import ConfigError


@dataclass(frozen=True)
class FileType:
    """A name users know, such as Q4_K_M."""

    name: str
    file_type_id: int  # of `general.file_type`
    codec: str  # of the tensors that no rule of the mix treats better


FILE_TYPES: MappingProxyType[str, FileType] = MappingProxyType(
    {
        name: FileType(name, number, codec)
        for name, number, codec in (
            ("F32", 0, "F32"), ("F16", 1, "F16"), ("BF16", 32, "BF16"),
            ("Q4_0", 2, "Q4_0"), ("Q4_1", 3, "Q4_1"), ("Q5_0", 8, "Q5_0"), ("Q5_1", 9, "Q5_1"), ("Q8_0", 7, "Q8_0"),
            ("Q2_K", 10, "Q2_K"), ("Q2_K_S", 21, "Q2_K"),
            ("Q3_K_S", 11, "Q3_K"), ("Q3_K_M", 12, "Q3_K"), ("Q3_K_L", 13, "Q3_K"),
            ("Q4_K_S", 14, "Q4_K"), ("Q4_K_M", 15, "Q4_K"),
            ("Q5_K_S", 16, "Q5_K"), ("Q5_K_M", 17, "Q5_K"),
            ("Q6_K", 18, "Q6_K"),
        )
    }
)  # fmt: skip
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def file_type(name: str) -> FileType:
    """The file type of a name in any case ('q4_k_m'; 'q4_k' means that too); ConfigError for an unknown one."""
    upper = name.upper()
    found = FILE_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        known = ", ".join([*FILE_TYPES, *_ALIASES])
        raise ConfigError(f"{name!r} is not a type to quantize to; known: {known}", param="type")
    return found
