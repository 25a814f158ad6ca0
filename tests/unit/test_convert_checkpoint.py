"""Reading checkpoints: safetensors against gguf-py's reader, shards, and every way a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.utility import SafetensorsLocal
from safetensors_file import write_safetensors

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.safetensors import read_header
from pyinfer.errors import ConvertError

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.normal(size=(5, 7)).astype(np.float32),
    "b": RNG.normal(size=11).astype(np.float32),
    "c": RNG.normal(size=(2, 3, 4)).astype(np.float32),
}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_tensors_equal_those_that_gguf_py_reads(tmp_path: Path, dtype: str) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS, dtype)
    with SafetensorsLocal(path) as expected:
        found = read_header(path)
        assert list(found) == list(TENSORS)
        for name, tensor in found.items():
            reference = expected[name]
            assert tensor.dtype == reference.dtype == dtype and tensor.shape == reference.shape
            assert tensor.read().tobytes() == bytes(reference.mmap_bytes())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_as_float32(tmp_path: Path, dtype: str) -> None:
    found = read_header(write_safetensors(tmp_path / "model.safetensors", TENSORS, dtype))
    for name, values in TENSORS.items():
        rows = values.reshape(-1, values.shape[-1])
        tolerance = {"F32": 0, "F16": 1e-3, "BF16": 8e-3}[dtype]
        np.testing.assert_allclose(found[name].dequantize(), rows, rtol=tolerance, atol=1e-6)
    np.testing.assert_array_equal(found["a"].dequantize(2, 4), found["a"].dequantize()[2:4])


def write_raw(path: Path, header: object, data: bytes = b"\0" * 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"not json", "header is damaged"),
        (b"[1]", "no JSON object"),
        (entry(data_offsets=[0, 12]), "takes 16 bytes, not 12"),
        (entry(data_offsets=[16, 0]), "takes 16 bytes, not -16"),
        (entry(data_offsets=[-16, 0]), "is damaged"),
        (entry(shape=[-4]), "is damaged"),
        (entry(shape=[4.0]), "is damaged"),
        (entry(shape="4"), "is damaged"),
        (entry(shape=[100], data_offsets=[0, 400]), "cut off.*fetch it again"),
        ({"t": {"dtype": "F32"}}, "is damaged"),
        ({"t": 3}, "is damaged"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: object, problem: str) -> None:
    with pytest.raises(ConvertError, match=problem):
        read_header(write_raw(tmp_path / "model.safetensors", header))


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_files_cut_off_in_the_header(tmp_path: Path, size: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", entry())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConvertError, match=r"model\.safetensors"):
        read_header(path)


def test_weights_that_are_no_floats(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", entry(dtype="F8_E4M3", data_offsets=[0, 4]))
    tensor = read_header(path)["t"]
    with pytest.raises(ConvertError, match="stored as F8_E4M3; convert the checkpoint that holds F32, F16, BF16"):
        tensor.dequantize()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    tensor = read_header(path)["c"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConvertError, match="became shorter"):
        tensor.read()


def write_shards(folder: Path) -> dict[str, str]:
    (folder / "config.json").write_text("{}")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in weight_map.items():
        write_safetensors(folder / file, {name: TENSORS[name]})
    index(folder, weight_map)
    return weight_map


def index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_safetensors(tmp_path / "consolidated.safetensors", TENSORS)  # not in the index: another copy
    checkpoint = HFCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    np.testing.assert_array_equal(checkpoint.tensors["a"].dequantize(), TENSORS["a"])


def test_shards_that_do_not_fit(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    index(tmp_path, {**weight_map, "c": weight_map["b"]})
    with pytest.raises(ConvertError, match="1 tensors that no file holds, such as c"):
        HFCheckpoint(tmp_path)
    index(tmp_path, {**weight_map, "c": "../c.safetensors"})
    with pytest.raises(ConvertError, match="not a file of this folder"):
        HFCheckpoint(tmp_path)
    index(tmp_path, {**weight_map, "c": "model-00003.safetensors"})
    with pytest.raises(ConvertError, match=r"model-00003\.safetensors: is missing"):
        HFCheckpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConvertError, match="weight_map"):
        HFCheckpoint(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2):
        write_safetensors(tmp_path / f"model-{number}.safetensors", TENSORS)
    with pytest.raises(ConvertError, match=r"tensor a is in model-1\.safetensors too"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConvertError, match=f"{name}: is a pickle, and reading one runs any code.*safe_serialization"):
        HFCheckpoint(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="does not exist"):
        HFCheckpoint(tmp_path / "nowhere")
    with pytest.raises(ConvertError, match=r"has no config\.json"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConvertError, match=r"config\.json: cannot be read"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConvertError, match="no JSON object"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConvertError, match="holds no model"):
        HFCheckpoint(tmp_path)
    with pytest.raises(ConvertError, match="is no folder"):
        HFCheckpoint(tmp_path / "config.json")
