"""Writes safetensors files: 8 bytes of length, a JSON header, the tensors' bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[np.generic]], dtype: str = "F32") -> Path:
    """`dtype` is F32, F16 or BF16 (the upper half of the float32, so give values that fit)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    at = 0
    for name, values in tensors.items():
        content = stored_bytes(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + len(content)]}
        parts.append(content)
        at += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *parts]))
    return path


def stored_bytes(values: npt.NDArray[np.generic], dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
