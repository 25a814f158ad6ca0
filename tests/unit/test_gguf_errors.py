"""Files that are wrong in one way each: the error names the field and where it is."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from pyinfer.errors import GGUFError
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.writer import write_gguf

pytestmark = pytest.mark.unit

# Pieces of a little-endian header.


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def header(n_tensors: int, n_keys: int, *parts: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(parts)


def key(name: str | bytes, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def line(name: str, dims: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


HUGE = (1 << 64) - 1
PAD = bytes(4096)
WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "magic": (b"GGML" + PAD, "magic at byte 0: b'GGML' is not b'GGUF'"),
    "short magic": (b"GG", "magic at byte 0: needs 4 bytes"),
    "no version": (b"GGUF", "version at byte 4"),
    "version 1": (header(0, 0, version=1), "version at byte 4: 1 is neither 2 nor 3"),
    "version 4": (header(0, 0, version=4), "version at byte 4: 4 is neither"),
    "version 0": (header(0, 0, version=0), "version at byte 4: 0 is neither"),
    "tensor count": (header(HUGE, 0), "tensor count at byte 8: 18446744073709551615 is above the limit"),
    "key count": (header(0, HUGE), "metadata count at byte 16: 18446744073709551615 is above"),
    "missing keys": (header(0, 1000), "length of metadata key 0 at byte 24: needs 8 bytes, the file has 0 left"),
    "missing tensors": (header(1000, 0), "length of name of tensor 0 at byte 24"),
    "key length": (header(0, 1, u64(HUGE), PAD), "length of metadata key 0 at byte 24: 1844674407.* is outside"),
    "empty key": (header(0, 1, key("", 4, u32(1))), "length of metadata key 0 at byte 24: 0 is outside 1..65535"),
    "key utf-8": (header(0, 1, key(b"a\xff", 4, u32(1))), "metadata key 0 at byte 32: not valid UTF-8"),
    "duplicate key": (header(0, 2, key("a", 4, u32(1)), key("a", 4, u32(2))), "metadata key 1 at byte 41: 'a' app"),
    "value type": (header(0, 1, key("a", 13, PAD)), "type of 'a' at byte 33: 13 is not a GGUF value type"),
    "bool": (header(0, 1, key("a", 7, b"\x02")), "value of 'a' at byte 37: 2 is not a bool"),
    "bool array": (header(0, 1, key("a", 9, u32(7) + u64(2) + b"\x00\x02")), "array 'a' at byte 37: holds a byte"),
    "cut value": (header(0, 1, key("a", 10, b"1234")), "value of 'a' at byte 37: needs 8 bytes, the file has 4 left"),
    "string length": (header(0, 1, key("a", 8, u64(1 << 62))), "value of 'a' at byte 45: needs 4611686018427387904"),
    "array count": (header(0, 1, key("a", 9, u32(6) + u64(1 << 62))), "array 'a' at byte 49: needs 184467440737"),
    "array type": (header(0, 1, key("a", 9, u32(99) + u64(0))), "item type of array 'a' at byte 37: 99 is not"),
    "string count": (header(0, 1, key("a", 9, u32(8) + u64(1 << 60))), "array 'a' at byte 49: needs 92233720368"),
    "string in array": (
        header(0, 1, key("a", 9, u32(8) + u64(2) + text("x") + u64(9))),
        r"array 'a'\[1\] at byte 58: length 9 runs past",
    ),
    "strings cut off": (
        header(0, 1, key("a", 9, u32(8) + u64(2) + text("12345678901"))),
        r"array 'a'\[1\] at byte 68: the file is cut off",
    ),
    "deep arrays": (
        header(0, 1, key("a", 9, (u32(9) + u64(1)) * 50)),
        r"array 'a\[0\]' at byte 49: holds 1 arrays at depth 2",
    ),
    "many arrays": (header(0, 1, key("a", 9, u32(9) + u64(1 << 20)), PAD), "holds 1048576 arrays at depth 1"),
    "alignment 12": (header(0, 1, key("general.alignment", 4, u32(12))), "general.alignment at byte 24: 12 is no"),
    "alignment 0": (header(0, 1, key("general.alignment", 4, u32(0))), "general.alignment at byte 24: 0 is no power"),
    "alignment 2^31": (header(0, 1, key("general.alignment", 4, u32(1 << 31))), "2147483648 is no power of two in 8"),
    "alignment text": (header(0, 1, key("general.alignment", 8, text("32"))), "general.alignment at byte 24: '32' is"),
    "no dims": (header(1, 0, line("w", ()), PAD), "dimension count of 'w' at byte 33: 0 is outside 1..4"),
    "five dims": (header(1, 0, line("w", (1,) * 5), PAD), "dimension count of 'w' at byte 33: 5 is outside 1..4"),
    "zero dim": (header(1, 0, line("w", (8, 0)), PAD), r"dimensions of 'w' at byte 37: \[8, 0\] holds a zero"),
    "dim overflow": (header(1, 0, line("w", (1 << 32,) * 4), PAD), "dimensions of 'w' at byte 37: .* bytes, the file"),
    "row length": (header(1, 0, line("w", (33,), 2), PAD), "rows of 33 weights are no multiple of Q4_0's block of 32"),
    "type": (header(1, 0, line("w", (8,), 4), PAD), "type of 'w' at byte 45: unknown tensor type 4"),
    "huge type": (header(1, 0, line("w", (8,), 0xFFFFFFFF), PAD), "unknown tensor type 4294967295"),
    "offset": (header(1, 0, line("w", (8,), 0, 1 << 63), PAD), "offset of 'w' at byte 24: the tensor ends at"),
    "unaligned": (header(1, 0, line("w", (8,), 0, 8), PAD), "offset of 'w' at byte 24: 8 is no multiple of the align"),
    "cut data": (header(1, 0, line("w", (1024,)), bytes(4090)), "the tensor ends at 4160, the file at 4147; it is cut"),
    "overlap": (header(2, 0, line("v", (64,)), line("w", (8,), 0, 64), PAD), "offset of 'w' at byte 57: .* overlaps"),
    "same name": (header(2, 0, line("w", (8,)), line("w", (8,), 0, 64), PAD), "tensor at byte 57: 'w' appears twice"),
    "empty name": (header(1, 0, line("", (8,)), PAD), "length of name of tensor 0 at byte 24: 0 is outside"),
    "split count": (header(0, 1, key("split.count", 8, text("2"))), "'split.count' is '2', not a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    (tmp_path / "wrong.gguf").write_bytes(content)
    with pytest.raises(GGUFError, match=message) as raised:
        GGUFFile.open(tmp_path / "wrong.gguf")
    assert "wrong.gguf: " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = {"general.architecture": "llama", "a": [True], "b": ["x", "yz"], "c": [1, 2], "d": [[1.5]], "e": 1}
    write_gguf(path, metadata, {"w": ("F32", (4, 8), np.zeros(128, np.uint8))})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(GGUFError):
            GGUFFile.open(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"none\.gguf: cannot be opened: No such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(GGUFError, match="not a regular file"):
        GGUFFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(GGUFError, match="not a regular file"):
        GGUFFile.open(tmp_path / "pipe.gguf")
