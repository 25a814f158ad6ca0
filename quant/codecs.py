"""The registry of tensor types. A new type is one file and one line in `_READABLE`."""

from __future__ import annotations

from types import MappingProxyType

from pyinfer.errors import ModelError
from pyinfer.quant.codec import ByteArray, Codec, FloatArray
from pyinfer.quant.plain import BF16, F16, F32, F64, I8, I16, I32, I64
from pyinfer.quant.q2_k import Q2_K
from pyinfer.quant.q3_k import Q3_K
from pyinfer.quant.q4_0 import Q4_0
from pyinfer.quant.q4_1 import Q4_1
from pyinfer.quant.q4_k import Q4_K
from pyinfer.quant.q5_0 import Q5_0
from pyinfer.quant.q5_1 import Q5_1
from pyinfer.quant.q5_k import Q5_K
from pyinfer.quant.q6_k import Q6_K
from pyinfer.quant.q8_0 import Q8_0

_READABLE: tuple[Codec, ...] = (
    F32(), F16(), BF16(), Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0(), Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K(),
    F64(), I8(), I16(), I32(), I64(),
)  # fmt: skip

# Types of ggml whose geometry we know, so that a file that holds them opens and lists: name -> (id, weights, bytes).
_GEOMETRY_ONLY = {
    "Q8_1": (9, 32, 36), "Q8_K": (15, 256, 292), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18),
}  # fmt: skip


class UnsupportedCodec(Codec):
    """A type of known geometry and unknown contents: it can be listed, its use is a ModelError."""

    supported = False

    def _dequantize_blocks(self, blocks: ByteArray) -> FloatArray:
        raise ModelError(f"tensor type {self.name} is not supported; supported: {', '.join(c.name for c in _READABLE)}")


def _geometry_only(name: str, type_id: int, block_size: int, block_bytes: int) -> Codec:
    members = {"name": name, "type_id": type_id, "block_size": block_size, "block_bytes": block_bytes}
    codec: Codec = type(name, (UnsupportedCodec,), members)()
    return codec


CODECS: MappingProxyType[str, Codec] = MappingProxyType(
    {c.name: c for c in (*_READABLE, *(_geometry_only(name, *g) for name, g in _GEOMETRY_ONLY.items()))}
)
_BY_ID = {c.type_id: c for c in CODECS.values()}


def codec_by_id(type_id: int) -> Codec:
    """The codec of ggml's type number; ModelError for a number that ggml never used or has withdrawn."""
    if type_id not in _BY_ID:
        known = ", ".join(f"{c.type_id} {c.name}" for c in _BY_ID.values())
        raise ModelError(f"unknown tensor type {type_id}; known: {known}")
    return _BY_ID[type_id]


def codec_by_name(name: str) -> Codec:
    """The codec of a type name in any case ('q4_k'); ModelError for an unknown one."""
    codec = CODECS.get(name.upper())
    if codec is None:
        raise ModelError(f"unknown tensor type {name!r}; known: {', '.join(CODECS)}")
    return codec
