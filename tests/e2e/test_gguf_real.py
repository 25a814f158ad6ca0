"""A real model file, read by us and by gguf-py: the same metadata and bit for bit the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest

from pyinfer.quant.gguf import GGUFFile

pytestmark = pytest.mark.e2e


def test_smollm2_equals_gguf_py(model_path: Callable[[str], Path]) -> None:
    path = model_path("smollm2")
    reader = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for key, value in file.metadata.items():
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == fields[key], key
        assert list(file.tensors) == [theirs.name for theirs in reader.tensors]
        for theirs in reader.tensors:
            tensor = file.tensors[theirs.name]
            assert (tensor.codec.name, tensor.shape) == (theirs.tensor_type.name, tuple(theirs.shape.tolist())[::-1])
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            np.testing.assert_array_equal(
                tensor.dequantize().reshape(-1).view(np.uint32), expected.reshape(-1).view(np.uint32), theirs.name
            )
            tensor.release()
