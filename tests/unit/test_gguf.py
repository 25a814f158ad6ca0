"""The GGUF reader and writer against gguf-py's, and against files that are wrong in one way each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pyinfer.errors import GGUFError, ModelError
from pyinfer.quant.codecs import CODECS
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.gguf_cursor import ByteOrder
from pyinfer.quant.writer import TensorSource, write_gguf

pytestmark = pytest.mark.unit

ORDERS: tuple[ByteOrder, ...] = ("<", ">")
STORED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Ein Modell – 模型",
    "a.count": 7,
    "a.negative": -7,
    "a.large": 1 << 40,
    "a.ratio": 0.5,
    "a.yes": True,
    "a.no": False,
    "tokenizer.ggml.tokens": ["<s>", "", "▁a", "\n", "🦙"],
    "tokenizer.ggml.scores": np.array([0, -1, -2.5, 3, 4], np.float32),
    "tokenizer.ggml.token_type": np.array([3, 1, 1, 6, 1], np.int32),
    "a.flags": [True, False, True],
    "a.numbers": [3, 1, 2],
    "a.empty": [],
}


def weights(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored_tensors() -> dict[str, TensorSource]:
    values = weights((3, 512))
    tensors: dict[str, TensorSource] = {
        f"blk.{name}.weight": (name, values.shape, CODECS[name].quantize(values)) for name in STORED
    }
    tensors["norm"] = ("F32", (5,), weights((5,)).view(np.uint8))
    tensors["experts"] = ("Q8_0", (2, 3, 4, 32), CODECS["Q8_0"].quantize(weights((2, 3, 4, 32))))
    tensors["ids"] = ("I64", (4,), np.array([1, -2, 3, 4], np.int64).view(np.uint8))
    return tensors


def same(ours: Any, theirs: Any) -> bool:
    return (ours.tolist() if isinstance(ours, np.ndarray) else ours) == theirs


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("version", [2, 3])
def test_round_trip(tmp_path: Path, order: ByteOrder, version: int) -> None:
    tensors = stored_tensors()
    write_gguf(tmp_path / "m.gguf", METADATA, tensors, order=order, version=version)
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert file.version == version
        assert file.size == (tmp_path / "m.gguf").stat().st_size
        assert list(file.metadata) == list(METADATA)
        for key, value in METADATA.items():
            assert same(file.metadata[key], value.tolist() if isinstance(value, np.ndarray) else value), key
        assert list(file.tensors) == list(tensors)
        for name, (codec, shape, data) in tensors.items():
            tensor = file.tensors[name]
            assert (tensor.name, tensor.codec.name, tensor.shape) == (name, codec, shape)
            assert tensor.data.shape == (int(np.prod(shape[:-1])), CODECS[codec].row_bytes(shape[-1]))
            np.testing.assert_array_equal(tensor.data.reshape(-1), data.reshape(-1))
            assert tensor.dequantize().shape == shape


@pytest.mark.parametrize("order", ORDERS)
def test_gguf_py_reads_what_we_write(tmp_path: Path, order: ByteOrder) -> None:
    tensors = stored_tensors()
    write_gguf(tmp_path / "m.gguf", METADATA, tensors, order=order)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    contents = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    empty = contents.pop("a.empty")
    assert len(empty) == 0
    assert contents == {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in METADATA.items()
        if key != "a.empty"
    }
    for theirs in reader.tensors:
        codec, shape, data = tensors[theirs.name]
        assert (theirs.tensor_type.name, tuple(theirs.shape.tolist())) == (codec, shape[::-1])
        if codec in ("F32", "F16", "I64"):
            native = data.reshape(-1).view(theirs.data.dtype.newbyteorder("="))
            np.testing.assert_array_equal(theirs.data.reshape(-1), native)
        elif order == "<":
            np.testing.assert_array_equal(theirs.data.reshape(-1), data.reshape(-1))


@pytest.mark.parametrize("endian", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_we_read_what_gguf_py_writes(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("f32", 0.25)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_token_types([1, 2, 3])
    writer.add_custom_alignment(64)
    matrix, half, vector = weights((4, 32), 1), weights((2, 3, 8), 2).astype(np.float16), weights((7,), 3)
    for name, value in (("matrix", matrix), ("half", half), ("vector", vector)):
        writer.add_tensor(name, value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        expected = {
            "u8": 200, "i8": -100, "u16": 60_000, "i16": -30_000, "u32": 4_000_000_000, "i32": -2_000_000_000,
            "u64": 1 << 63, "i64": -(1 << 62), "f32": 0.25, "f64": 0.1, "yes": True,
        }  # fmt: skip
        assert {key: file.metadata[key] for key in expected} == expected
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ü"]
        assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0, 2.0]
        assert file.metadata["tokenizer.ggml.token_type"].tolist() == [1, 2, 3]
        np.testing.assert_array_equal(file.tensors["matrix"].dequantize(), matrix)
        np.testing.assert_array_equal(file.tensors["half"].dequantize(), half.astype(np.float32))
        np.testing.assert_array_equal(file.tensors["vector"].dequantize(), vector)


def test_native_tensors_are_views(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {}, stored_tensors())
    file = GGUFFile.open(tmp_path / "m.gguf")
    for tensor in file.tensors.values():
        assert tensor.mapping is not None
        assert np.shares_memory(tensor.data, tensor.mapping.array)
        assert not tensor.data.flags.writeable
    file.close()


def test_release_and_close_leave_tensors_readable(tmp_path: Path) -> None:
    values = weights((64, 512))
    source: dict[str, TensorSource] = {"w": ("F32", values.shape, values.view(np.uint8))}
    write_gguf(tmp_path / "m.gguf", {}, source)
    file = GGUFFile.open(tmp_path / "m.gguf")
    tensor = file.tensors["w"]
    tensor.release()
    np.testing.assert_array_equal(tensor.dequantize(), values)
    file.close()
    assert file.tensors == {}
    tensor.release()
    np.testing.assert_array_equal(tensor.dequantize(), values)


def write_shards(folder: Path, n_tensors: int = 5) -> list[Path]:
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2)
    for i in range(n_tensors):
        writer.add_tensor(f"t{i}", weights((2, 8), i))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def test_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    assert [s.name for s in shards] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for given in (shards[0], shards[2]):
        with GGUFFile.open(given) as file:
            assert file.path == shards[0]
            assert file.size == sum(s.stat().st_size for s in shards)
            assert file.metadata["general.architecture"] == "llama"
            assert list(file.tensors) == [f"t{i}" for i in range(5)]
            for i in range(5):
                np.testing.assert_array_equal(file.tensors[f"t{i}"].dequantize(), weights((2, 8), i))


def test_wrong_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(shards[0].read_bytes())
    with pytest.raises(GGUFError, match=r"'split\.count' is 3, so the file's name must end in -00001-of-00003\.gguf"):
        GGUFFile.open(renamed)
    second = shards[1].read_bytes()
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(GGUFError, match=r"m-00002-of-00003\.gguf: metadata 'split.no' is 2, expected 1"):
        GGUFFile.open(shards[0])
    shards[1].unlink()
    with pytest.raises(GGUFError, match=r"m-00002-of-00003\.gguf: shard 2 of 3 is missing"):
        GGUFFile.open(shards[0])
    common = {"split.no": np.uint16(1), "split.count": np.uint16(3), "split.tensors.count": np.int32(5)}
    write_gguf(shards[1], common, {})
    with pytest.raises(GGUFError, match=r"'split.tensors.count' is 5, the 3 shards hold 3 tensors"):
        GGUFFile.open(shards[0])
    twin = CODECS["F32"].quantize(weights((2, 8)))
    write_gguf(shards[1], common, {"t0": ("F32", (2, 8), twin), "t9": ("F32", (2, 8), twin)})
    with pytest.raises(GGUFError, match="tensor 't0' is in another shard too"):
        GGUFFile.open(shards[0])
    write_gguf(shards[1], {"split.no": [1, 2], "split.count": np.uint16(3)}, {})
    with pytest.raises(GGUFError, match=r"'split\.no' is array"):
        GGUFFile.open(shards[0])
    shards[1].write_bytes(second)
    GGUFFile.open(shards[0]).close()


def test_unsupported_types_open_and_list(tmp_path: Path) -> None:
    data = np.zeros(4 * 66, np.uint8)
    write_gguf(tmp_path / "m.gguf", {}, {"w": ("IQ2_XXS", (2, 512), data)})
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        tensor = file.tensors["w"]
        assert (tensor.codec.name, tensor.shape, tensor.n_bytes) == ("IQ2_XXS", (2, 512), 4 * 66)
        with pytest.raises(ModelError, match="IQ2_XXS is not supported"):
            tensor.dequantize()


def test_get_and_require(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", METADATA, {})
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert file.get("a.count", 0) == 7
        assert file.get("missing", 3) == 3
        assert file.require("a.count", int) == 7
        assert file.require("a.count", float) == 7.0
        assert file.require("a.yes", bool) is True
        assert file.require("general.architecture", str) == "llama"
        assert file.require("tokenizer.ggml.token_type", list) == [3, 1, 1, 6, 1]
        assert file.require("tokenizer.ggml.tokens", list)[4] == "🦙"
        for key, kind in (("a.ratio", int), ("a.yes", int), ("general.name", float), ("a.count", str)):
            with pytest.raises(ModelError, match=f"'{key}' is a"):
                file.require(key, kind)
        with pytest.raises(ModelError, match=r"m\.gguf: metadata has no 'missing'"):
            file.require("missing", int)


def test_strings_that_are_not_utf8(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"one": "a\udcff", "many": ["ok", "\udce2\udc96"]}, {})
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert file.metadata["one"] == "a\ufffd"
        assert [s.encode("utf-8", "surrogateescape") for s in file.metadata["many"]] == [b"ok", b"\xe2\x96"]


def test_nested_arrays(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"pairs": [[1, 2], [3], ["a"]]}, {})
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        pairs = file.metadata["pairs"]
        assert [pairs[0].tolist(), pairs[1].tolist(), pairs[2]] == [[1, 2], [3], ["a"]]


def test_the_writer_leaves_nothing_half_done(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {"a": 1}, {})
    before = path.read_bytes()
    with pytest.raises(GGUFError, match=r"tensor 'w': F32 of \(2, 8\) takes 64 bytes, not 60"):
        write_gguf(path, {"a": 2}, {"w": ("F32", (2, 8), np.zeros(60, np.uint8))})
    for value in (object(), [1, "a"], np.zeros((2, 2)), np.complex64(1), 1 << 70):
        with pytest.raises(GGUFError, match="metadata"):
            write_gguf(path, {"a": value}, {})
    with pytest.raises(ModelError, match="row of 100 weights"):
        write_gguf(path, {}, {"w": ("Q4_K", (100,), np.zeros(144, np.uint8))})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
