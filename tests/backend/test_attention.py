"""Storing keys and values and attending over pages, on every ISA, against float64; bit-equal however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from cpu_kernels import F32, ISAS, Guarded, call, compiler, float_bits, padded_rows, rng_of, step_header

from pyinfer.kernels_cpu.attention import attention_body, scratch_bytes
from pyinfer.kernels_cpu.attention_args import PARTITION, AttentionArg
from pyinfer.kernels_cpu.attention_merge import merge_body
from pyinfer.kernels_cpu.compiler import emit_ir
from pyinfer.kernels_cpu.isa import make_isa
from pyinfer.kernels_cpu.kv_store import StoreArg, store_kv_body

pytestmark = pytest.mark.backend

NO_WINDOW = 1 << 40
GARBAGE = {"f16": 65504.0, "f32": 3e38}  # the largest finite value that a stale slot may hold
DTYPES = {"f16": np.float16, "f32": np.float32}
Span = tuple[int, int, int]  # sequence, first position, end


@dataclass(frozen=True)
class Shape:
    head_dim: int
    dtype: str
    block_size: int = 16
    n_kv_heads: int = 2
    group: int = 2  # query heads for each KV head
    window: int = NO_WINDOW

    def __str__(self) -> str:
        window = "" if self.window == NO_WINDOW else f"-window{self.window}"
        return f"{self.head_dim}{self.dtype}-page{self.block_size}-{self.n_kv_heads}x{self.group}{window}"


ON_EVERY_ISA = (
    Shape(64, "f16", 16, 3, 3),
    Shape(64, "f16", 32, 1, 1, window=300),
    Shape(80, "f16", 16, 2, 8, window=100),
    Shape(80, "f16", 64, 1, 5),
    Shape(96, "f32", 64, 2, 5, window=257),
    Shape(96, "f32", 16, 1, 4),
)
ON_THE_BEST = (
    Shape(16, "f32", 16, 2, 2, window=8),
    Shape(48, "f32", 64, 1, 1),
    Shape(64, "f32", 32, 1, 7, window=1),
    Shape(128, "f16", 32, 2, 6),
    Shape(128, "f32", 16, 1, 2, window=256),
    Shape(256, "f16", 16, 1, 4, window=512),
)
# AVX-VNNI has AVX2's code wherever no bytes are multiplied, as a test below sees
DISTINCT_ISAS = tuple(isa for isa in ISAS if isa != "avxvnni" or "avx2" not in ISAS)
CASES = [(isa, s) for s in ON_EVERY_ISA for isa in DISTINCT_ISAS] + [(ISAS[0], s) for s in ON_THE_BEST]
BY_CASE = pytest.mark.parametrize("isa, shape", CASES, ids=str)
LENGTHS = (1100, 1, 257, 40)


@dataclass
class Pages:
    """Sequences of random keys and values in shuffled pages; every slot that nobody wrote holds garbage."""

    isa: str
    shape: Shape
    lengths: Sequence[int] = LENGTHS
    garbage_seed: int = 0
    tables: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        rng = rng_of("kv", s.head_dim, s.n_kv_heads)
        width = s.n_kv_heads * s.head_dim
        self.k = [rng.standard_normal((n, width)).astype(np.float32) for n in self.lengths]
        self.v = [rng.standard_normal((n, width)).astype(np.float32) for n in self.lengths]
        self.q = [rng.standard_normal((n, width * s.group)).astype(np.float32) for n in self.lengths]
        counts = [-(-n // s.block_size) for n in self.lengths]
        order = rng_of("pages", self.lengths).permutation(sum(counts) + 3).astype(np.int32)
        self.tables = np.zeros((len(counts), max(counts)), np.int32)
        for table, start, count in zip(self.tables, np.cumsum([0, *counts]), counts, strict=False):
            table[:count] = order[start : start + count]
        n_slots = len(order) * s.block_size
        noise = rng_of("garbage", self.garbage_seed).uniform(-1, 1, (2, n_slots * width)) * GARBAGE[s.dtype]
        self.pools = [Guarded(n_slots * width * np.dtype(DTYPES[s.dtype]).itemsize) for _ in noise]
        for pool, values in zip(self.pools, noise, strict=True):
            pool.bytes.view(DTYPES[s.dtype])[:] = values
        for sequence, n in enumerate(self.lengths):
            self.store(sequence, np.arange(n))

    def store(self, sequence: int, positions: npt.NDArray[np.int64]) -> None:
        s = self.shape
        page = self.tables[sequence, positions // s.block_size]
        slots = (page * s.block_size + positions % s.block_size).astype(np.int32)
        (k, k_stride), (v, v_stride) = (
            padded_rows(self.k[sequence][positions]),
            padded_rows(self.v[sequence][positions]),
        )
        arguments = {
            StoreArg.K: k.address, StoreArg.K_STRIDE: k_stride, StoreArg.V: v.address, StoreArg.V_STRIDE: v_stride,
            StoreArg.K_PAGES: self.pools[0].address, StoreArg.V_PAGES: self.pools[1].address,
            StoreArg.BLOCK_SIZE: s.block_size, StoreArg.N_HEADS: s.n_kv_heads, StoreArg.SLOTS_AT: 4 * len(slots),
        }  # fmt: skip
        kernel = compiler(self.isa).kernel(
            f"store_kv_{s.head_dim}_{s.dtype}_{s.dtype}", store_kv_body(s.head_dim, s.dtype, s.dtype)
        )
        two_groups = np.stack([slots[::-1], slots])  # the layer is in the second
        step = step_header(slots=two_groups.ctypes.data, n_tokens=len(slots))
        call(kernel, arguments, step, len(slots), cuts=(len(slots) // 3,))
        for pool in self.pools:
            pool.check()

    def attend(
        self, spans: Sequence[Span], *, tile: int = 8, parts: int = 1, shares: int = 1, cuts: Sequence[int] = ()
    ) -> list[F32]:
        """One step over spans of positions: for each the result [tokens, heads * head_dim].

        With `shares` above 1 each sequence's partitions are shared out and merged by a second kernel.
        """
        s = self.shape
        x, stride = padded_rows(np.concatenate([self.q[i][a:b] for i, a, b in spans]))
        positions = np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in spans])
        tables = self.tables[[i for i, _, _ in spans]]
        tables = np.stack([np.full_like(tables, -1), tables])  # of two groups; the layer is in the second
        starts = np.cumsum([0, *(b - a for _, a, b in spans)])
        tiles = np.array(
            [
                (row, token, min(tile, end - token), 0)
                for row, (start, end) in enumerate(pairwise(starts))
                for token in range(start, end, tile)
            ],
            np.int32,
        )
        n_heads, max_partitions = s.n_kv_heads * s.group, -(-max(self.lengths) // PARTITION)
        partials = Guarded(len(positions) * n_heads * max_partitions * (s.head_dim + 2) * 4, 0xFF)
        out = Guarded(stride * len(positions), 0xFF)
        arguments = {
            AttentionArg.Q: x.address, AttentionArg.Q_STRIDE: stride,
            AttentionArg.OUT: out.address, AttentionArg.OUT_STRIDE: stride,
            AttentionArg.K_PAGES: self.pools[0].address, AttentionArg.V_PAGES: self.pools[1].address,
            AttentionArg.BLOCK_SIZE: s.block_size, AttentionArg.N_KV_HEADS: s.n_kv_heads,
            AttentionArg.GROUP: s.group, AttentionArg.WINDOW: s.window,
            AttentionArg.SCALE: float_bits(s.head_dim**-0.5), AttentionArg.N_PARTS: parts,
            AttentionArg.PAGE_SHIFT: (s.block_size // 16).bit_length() - 1,
            AttentionArg.PARTIALS: partials.address, AttentionArg.MAX_PARTITIONS: max_partitions,
            AttentionArg.TABLES_AT: tables.strides[0],
        }  # fmt: skip
        step = step_header(
            n_tokens=len(positions), positions=positions.ctypes.data, page_tables=tables.ctypes.data,
            page_table_stride=tables.strides[1], attention_tiles=tiles.ctypes.data, n_attention=len(tiles) * shares,
            n_spans=shares, n_merged=len(positions),
        )  # fmt: skip
        token_rows = -(-s.group // parts)
        kernel = compiler(self.isa).kernel(
            f"attention_{s.head_dim}_{s.dtype}_{s.dtype}_{token_rows}",
            attention_body(s.head_dim, s.dtype, s.dtype, token_rows),
        )
        n_tasks = len(tiles) * s.n_kv_heads * parts * shares
        call(kernel, arguments, step, n_tasks, cuts=cuts, scratch_bytes=scratch_bytes(s.head_dim))
        if shares > 1:
            merge = compiler(self.isa).kernel(f"attention_merge_{s.head_dim}", merge_body(s.head_dim))
            call(merge, arguments, step, len(positions) * n_heads, cuts=(1, 3))
        out.check()
        partials.check()
        rows = out.floats(len(positions))[:, : self.q[0].shape[1]]
        return [part.copy() for part in np.split(rows, starts[1:-1])]


F64 = npt.NDArray[np.float64]


def exact(pages: Pages, sequence: int, rows: npt.NDArray[np.int64]) -> tuple[F64, F64]:
    """What these positions of a sequence attend to, in float64 over the stored keys and values.

    Results [rows, heads * head_dim], and the largest weight of each in the same shape.
    """
    s, n = pages.shape, pages.lengths[sequence]
    k, v = (
        x[sequence].astype(DTYPES[s.dtype]).astype(np.float64).reshape(n, s.n_kv_heads, 1, s.head_dim)
        for x in (pages.k, pages.v)
    )
    q = pages.q[sequence][rows].astype(np.float64).reshape(len(rows), s.n_kv_heads, s.group, s.head_dim)
    scores = q.transpose(1, 2, 0, 3) @ k.transpose(1, 2, 3, 0) / np.sqrt(s.head_dim)  # [kv heads, group, rows, n]
    distance = rows[:, None] - np.arange(n)[None]
    scores[:, :, (distance < 0) | (distance >= s.window)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    results = (weights @ v.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3).reshape(len(rows), -1)
    largest = weights.max(-1).transpose(2, 0, 1).reshape(len(rows), -1)
    return results, np.repeat(largest, s.head_dim, axis=1)


def some_rows(n: int) -> npt.NDArray[np.int64]:
    """The first ones, those around the ends of partitions and every 11th."""
    p = np.arange(n)
    return p[(p < 40) | (p % 11 == 0) | (p % 256 < 2) | (p % 256 > 253) | (p > n - 3)]


@lru_cache(maxsize=len(LENGTHS))
def exact_prompts(shape: Shape) -> list[F64]:
    """Of all sequences: the same for every ISA."""
    pages = Pages(ISAS[0], shape)
    return [exact(pages, sequence, some_rows(n))[0] for sequence, n in enumerate(LENGTHS)]


def parts_of(isa: str, shape: Shape) -> list[int]:
    """Into how many a group of heads is cut, first not at all. Each is a kernel to compile: one ISA has those in between."""
    between = {2, min(3, shape.group)} if isa == ISAS[0] else set()
    return sorted({1, *between, shape.group})


def spans_of(lengths: Sequence[int]) -> list[Span]:
    return [(i, 0, n) for i, n in enumerate(lengths)]


@pytest.mark.skipif(DISTINCT_ISAS == ISAS, reason="this CPU has no AVX-VNNI")
@pytest.mark.parametrize("dtype", DTYPES)
def test_avxvnni_has_the_code_of_avx2(dtype: str) -> None:
    vnni, avx2 = make_isa("avxvnni"), make_isa("avx2")
    assert (vnni.cpu, vnni.features) == (avx2.cpu, avx2.features)
    for body in (attention_body(64, dtype, dtype, 3), merge_body(64), store_kv_body(64, dtype, dtype)):
        assert emit_ir("f", vnni, body) == emit_ir("f", avx2, body)


@BY_CASE
def test_prompts_equal_float64(isa: str, shape: Shape) -> None:
    for result, expected in zip(Pages(isa, shape).attend(spans_of(LENGTHS)), exact_prompts(shape), strict=True):
        np.testing.assert_allclose(result[some_rows(len(result))], expected, rtol=0, atol=3e-6)


@BY_CASE
def test_decode_and_chunks_equal_the_prompt_bit_for_bit(isa: str, shape: Shape) -> None:
    pages = Pages(isa, shape)
    whole = pages.attend(spans_of(LENGTHS))
    (alone,) = pages.attend([(0, 0, LENGTHS[0])])
    np.testing.assert_array_equal(alone, whole[0])
    for chunk in (7, 16, 100):
        for a in range(0, LENGTHS[0], chunk):
            b = min(a + chunk, LENGTHS[0])
            (part,) = pages.attend([(0, a, b)])
            np.testing.assert_array_equal(part, whole[0][a:b], err_msg=f"chunk {a}..{b}")
    for p in some_rows(LENGTHS[0]):
        (part,) = pages.attend([(0, p, p + 1)])
        np.testing.assert_array_equal(part[0], whole[0][p], err_msg=f"position {p}")


@BY_CASE
def test_no_cut_into_tiles_parts_and_threads_changes_a_bit(isa: str, shape: Shape) -> None:
    pages = Pages(isa, shape)
    spans: list[Span] = [(3, 20, 40), (0, 1080, 1100), (1, 0, 1), (2, 250, 257)]
    expected = pages.attend(spans)
    for tile in (1, 3, 8):
        for parts in parts_of(isa, shape):
            result = pages.attend(spans, tile=tile, parts=parts, cuts=(1, 2, 7))
            for ours, theirs in zip(result, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=f"tiles of {tile}, {parts} parts")


@BY_CASE
def test_sharing_out_the_partitions_changes_no_bit(isa: str, shape: Shape) -> None:
    pages = Pages(isa, shape)
    for spans in ([(0, 1095, 1100)], [(3, 38, 40), (0, 766, 770), (1, 0, 1), (2, 255, 257)]):
        expected = pages.attend(spans)
        for shares in (2, 3, 5, 9):
            result = pages.attend(spans, shares=shares, parts=parts_of(isa, shape)[:2][-1], cuts=(1, 5))
            for ours, theirs in zip(result, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{shares} shares")


@BY_CASE
def test_stale_slots_do_not_matter(isa: str, shape: Shape) -> None:
    first, second = (Pages(isa, shape, (300, 21), garbage_seed=seed) for seed in (1, 2))
    spans: list[Span] = [(0, 280, 300), (1, 20, 21)]
    assert (first.pools[0].bytes != second.pools[0].bytes).any()
    results = [pages.attend(spans) for pages in (first, second)]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # pages that no row of the step can see any more may have gone to somebody else
    unseen = max(0, 281 - shape.window) // 16 * 16 // shape.block_size
    first.tables[0, :unseen] = first.tables[1, 0]
    np.testing.assert_array_equal(first.attend(spans)[0], results[0][0])


@BY_CASE
def test_large_scores_do_not_overflow(isa: str, shape: Shape) -> None:
    pages = Pages(isa, shape, (270,))
    pages.q[0] *= 300  # scores of several hundred, so that mostly one position has all the weight
    (result,) = pages.attend([(0, 0, 270)])
    expected, largest = exact(pages, 0, np.arange(270))
    certain = largest > 1 - 1e-9
    assert certain.mean() > 0.5
    np.testing.assert_allclose(result[certain], expected[certain], rtol=0, atol=1e-6)
    assert np.isfinite(result).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_keys_and_values_are_stored_where_the_layout_says(isa: str, dtype: str, block_size: int) -> None:
    head_dim = 64 if dtype == "f16" else 96
    pages = Pages(isa, Shape(head_dim, dtype, block_size, 2, 1), (50,))
    pages.k[0][7, :4] = [70000, -70000, np.inf, 1 + 2**-11]  # float16 saturates, ties go to even
    pages.v[0][7, :4] = [-np.inf, 65520, 3e38, 1 + 3 * 2**-11]
    pages.store(0, np.arange(50))
    stored_k, stored_v = (pool.bytes.view(DTYPES[dtype]) for pool in pages.pools)
    n_pages = stored_k.size // (block_size * 2 * head_dim)
    keys = stored_k.reshape(n_pages, 2, block_size // 16, head_dim, 16).transpose(0, 2, 4, 1, 3)
    keys = keys.reshape(n_pages, block_size, 2, head_dim)
    values = stored_v.reshape(n_pages, 2, block_size, head_dim).transpose(0, 2, 1, 3)
    position = np.arange(50)
    page = pages.tables[0, position // block_size]
    for found, given in ((keys, pages.k[0]), (values, pages.v[0])):
        limit = 65504 if dtype == "f16" else np.inf
        expected = np.clip(given, -limit, limit).astype(DTYPES[dtype]).reshape(50, 2, head_dim)
        np.testing.assert_array_equal(found[page, position % block_size], expected)
