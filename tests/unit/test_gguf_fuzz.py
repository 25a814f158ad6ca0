"""20,000 broken headers: each opens or is a GGUFError, at once and without taking memory."""

from __future__ import annotations

import gc
import mmap
import os
import random
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyinfer.errors import GGUFError
from pyinfer.quant.codecs import CODECS
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.gguf_cursor import ByteOrder
from pyinfer.quant.writer import TensorSource, write_gguf

pytestmark = pytest.mark.unit

SECONDS_A_CASE = 1.0
BYTES_A_CASE = 200 << 20
INTERESTING = (0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
INTERESTING_64 = (*INTERESTING, 1 << 32, 1 << 40, (1 << 61) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1)

Mutation = Callable[[random.Random, bytearray], None]


def flip_bytes(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def random_bytes(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    data[start : start + rng.randrange(1, 32)] = rng.randbytes(rng.randrange(1, 32))


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def number_32(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(max(1, len(data) - 4))
    data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(INTERESTING))


def number_64(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(max(1, len(data) - 8))
    data[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice(INTERESTING_64))


def count_or_version(rng: random.Random, data: bytearray) -> None:
    at, code = rng.choice(((4, "I"), (8, "Q"), (16, "Q")))
    size = struct.calcsize(code)
    value = rng.choice(INTERESTING) if code == "I" else rng.choice((*INTERESTING_64, rng.randrange(200)))
    data[at : at + size] = struct.pack("<" + code, value)


def length_field(rng: random.Random, data: bytearray) -> None:
    """Overwrite eight bytes that look like a small length, the fields that a reader trusts most."""
    places = [i for i in range(24, len(data) - 8) if data[i] and not any(data[i + 2 : i + 8])]
    if places:
        at = rng.choice(places)
        (old,) = struct.unpack_from("<Q", data, at)
        new = rng.choice((old + 1, old - 1, old * 8, old << 32, rng.choice(INTERESTING_64))) % (1 << 64)
        data[at : at + 8] = struct.pack("<Q", new)


def swap_runs(rng: random.Random, data: bytearray) -> None:
    size = rng.choice((4, 8, 8, 24))
    if len(data) > 2 * size:
        first, second = rng.randrange(len(data) - size), rng.randrange(len(data) - size)
        data[first : first + size], data[second : second + size] = (
            data[second : second + size],
            data[first : first + size],
        )


def insert_or_delete(rng: random.Random, data: bytearray) -> None:
    at, size = rng.randrange(len(data)), rng.randrange(1, 64)
    if rng.random() < 0.5:
        data[at:at] = rng.choice((bytes(size), rng.randbytes(size), bytes(data[at : at + size])))
    else:
        del data[at : at + size]


MUTATIONS: tuple[Mutation, ...] = (
    flip_bytes, random_bytes, truncate, number_32, number_64, count_or_version, length_field, swap_runs,
    insert_or_delete,
)  # fmt: skip


def seed_files(folder: Path) -> list[bytes]:
    """Small whole files: every value type and several tensor types, in both orders; a vocabulary; a shard."""
    path = folder / "seed.gguf"
    seeds = []
    values = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    tensors: dict[str, TensorSource] = {
        f"blk.{name}": (name, (2, 256), CODECS[name].quantize(values)) for name in ("F32", "Q8_0", "Q4_K")
    }
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.uint64, np.int64, np.float64)
    metadata = {
        "general.architecture": "llama", "general.alignment": np.uint32(32), "flag": True, "flags": [True, False],
        "nested": [[1, 2], ["x"]], **{f"one.{k.__name__}": k(1) for k in kinds},
        **{f"many.{k.__name__}": np.arange(3).astype(k) for k in kinds},
    }  # fmt: skip
    orders: tuple[ByteOrder, ...] = ("<", ">")
    for order in orders:
        write_gguf(path, metadata, tensors, order=order)
        seeds.append(path.read_bytes())
    vocabulary = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"tok{i}é" for i in range(300)],
        "tokenizer.ggml.merges": [f"a{i} b{i}" for i in range(200)],
        "tokenizer.ggml.scores": np.zeros(300, np.float32), "tokenizer.ggml.token_type": np.ones(300, np.int32),
    }  # fmt: skip
    write_gguf(path, vocabulary, {}, version=2)
    seeds.append(path.read_bytes())
    write_gguf(path, {"split.count": np.uint16(2), "split.no": np.uint16(0)}, {"t": tensors["blk.F32"]})
    seeds.append(path.read_bytes())
    return seeds


def open_and_read(path: Path) -> bool:
    """Whether the file opens; then its values are looked at as `pyinfer show --tensors` would."""
    try:
        file = GGUFFile.open(path)
    except GGUFError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    with file:
        for value in file.metadata.values():
            repr(value)
        for tensor in file.tensors.values():
            assert tensor.n_bytes <= file.size
            if tensor.codec.supported:
                tensor.dequantize(slice(0, 1))
    return True


@contextmanager
def at_most_more_memory(n_bytes: int) -> Iterator[None]:
    """Let the process take no more private memory than this on top, not even memory that it never touches."""
    gc.collect()  # what earlier tests left behind must not make room later
    status = Path("/proc/self/status")
    found = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found is None:
        pytest.skip("this system does not tell its memory as Linux does")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(found[1]) * 1024 + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_the_memory_limit_works() -> None:
    # straight from the system: the C library may still hold what earlier tests gave back to it
    with at_most_more_memory(BYTES_A_CASE), pytest.raises(OSError, match="allocate memory"):
        mmap.mmap(-1, BYTES_A_CASE + (1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize("batch", range(10))
def test_mutated_headers(tmp_path: Path, batch: int) -> None:
    rng = random.Random(batch)
    seeds = seed_files(tmp_path)
    path = tmp_path / "case-00001-of-00002.gguf"
    open_files = len(os.listdir("/proc/self/fd"))
    opened = 0
    with at_most_more_memory(BYTES_A_CASE):
        for case in range(2000):
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                if data:
                    rng.choice(MUTATIONS)(rng, data)
            path.write_bytes(data)
            start = time.thread_time()
            opened += open_and_read(path)
            took = time.thread_time() - start
            assert took < SECONDS_A_CASE, f"batch {batch} case {case}: {took} s"
    assert 50 < opened < 1500  # the mutations neither all miss nor all kill
    assert len(os.listdir("/proc/self/fd")) <= open_files + 2


def test_the_longest_tables_stay_cheap(tmp_path: Path) -> None:
    """As many keys and tensors as a header may have, none of them wrong."""
    count = 65_536
    keys = b"".join(struct.pack("<Q6sIB", 6, b"k%05d" % i, 0, 1) for i in range(count))
    lines = b"".join(struct.pack("<Q6sIQIQ", 6, b"t%05d" % i, 1, 8, 0, 32 * i) for i in range(count))
    header = b"GGUF" + struct.pack("<IQQ", 3, count, count) + keys + lines
    path = tmp_path / "many.gguf"
    path.write_bytes(header + bytes(-len(header) % 32 + 32 * count))
    with at_most_more_memory(BYTES_A_CASE), GGUFFile.open(path) as file:
        assert (len(file.metadata), len(file.tensors)) == (count, count)
