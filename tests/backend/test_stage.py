"""Whole tiny models on `CPUStage`: logits against the reference interpreter, and bit-equal however a prompt is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch, one_table, run_prompt
from cpu_kernels import BLOCK_TYPES, FLOAT_TYPES, ISAS
from tiny_models import TinyShape

from pyinfer.errors import ConfigError, ModelError
from pyinfer.graph.backend import Backend, Stage, StageConfig, kv_page_bytes
from pyinfer.graph.graph import Graph
from pyinfer.graph.kv_groups import group_layers
from pyinfer.graph.ops import RouteExperts
from pyinfer.graph.passes import narrow_activations, optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_cpu.isa import current_isa, make_isa
from pyinfer.kernels_cpu.stage import CPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = pytest.mark.backend

TinyModel = Callable[..., Path]
F32 = npt.NDArray[np.float32]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
TYPES = (*BLOCK_TYPES, *FLOAT_TYPES)
PROMPT: list[int] = np.random.RandomState(5).randint(0, 300, 90).tolist()
LONG: list[int] = np.random.RandomState(6).randint(0, 300, 300).tolist()
N_PAGES = 64
ALL_PAGES: list[int] = np.random.RandomState(7).permutation(N_PAGES).tolist()
PAGES = ALL_PAGES[:32]  # of one sequence: what n_ctx = 512 takes


def mixed(name: str) -> str:
    """A file with every kind of neighbour: float beside quantized, K beside legacy types."""
    kinds = {"token_embd": "Q6_K", "attn_v": "Q6_K", "attn_q": "F16", "ffn_down": "Q5_1", "ffn_up": "Q8_0"}
    kinds["ffn_gate_exps"] = "F16"
    return next((kind for part, kind in kinds.items() if part in name), "Q4_K")


@lru_cache(maxsize=64)
def graph_of(path: Path) -> Graph:
    return one_table(optimize(build_graph(GGUFFile.open(path))))


def config(kv_dtype: str = "f16", n_threads: int = 1, **sizes: Any) -> StageConfig:
    sizes = {"n_pages": N_PAGES, "n_ctx": 512, "max_tokens": 512, **sizes}
    return StageConfig(kv_dtype=kv_dtype, n_threads=n_threads, **sizes)


@contextmanager
def opened(path: Path, config: StageConfig) -> Iterator[CPUStage]:
    stage = CPUBackend().open_stage(graph_of(path), config)
    try:
        yield stage
    finally:
        stage.close()


@lru_cache(maxsize=64)
def _reference(path: Path, kv_dtype: str, isa: str) -> tuple[F32, F32]:
    graph = graph_of(path)
    graph = narrow_activations(graph) if make_isa(isa).bfloat else graph
    stage = ReferenceBackend().open_stage(graph, config(kv_dtype))
    return run_prompt(stage, PROMPT, PAGES, 16), singles(stage)


def reference(path: Path, kv_dtype: str) -> tuple[F32, F32]:
    """The interpreter's logits of PROMPT, and of its first tokens as sequences of their own."""
    return _reference(path, kv_dtype, current_isa().name)


def is_exact(kind: object) -> bool:
    """Whether activations are not rounded before these weights."""
    return kind in FLOAT_TYPES and not (kind == "BF16" and current_isa().bfloat)


def singles(stage: Stage) -> F32:
    """Forty sequences of one token: their logits do not reach each other."""
    return stage.run(
        make_batch([Piece([token], [page]) for token, page in zip(PROMPT[:40], ALL_PAGES, strict=False)], 16)
    )


def relative_errors(logits: F32, expected: F32) -> F32:
    """Of each row, relative to the largest logit."""
    return np.abs(logits - expected).max(1) / np.abs(expected).max()


def kl(expected: F32, logits: F32) -> npt.NDArray[np.float64]:
    def logprobs(x: F32) -> npt.NDArray[np.float64]:
        shifted = x.astype(np.float64) - x.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    p, q = logprobs(expected), logprobs(logits)
    return (np.exp(p) * (p - q)).sum(1)


def check_against_reference(path: Path, kv_dtype: str, n_threads: int, *, is_float: bool) -> None:
    """Bounds are a few times what every type, architecture and ISA was measured at.

    Float weights differ by rounding: 1e-6, and 6e-5 where keys and values round to float16 differently. With rounded
    activations a code halfway between two integers may fall either way, which moves what follows it by up to 1.2e-2
    (KL 1.3e-3); of sequences of one token most meet no such code and are as close as float weights are. With it the choice
    of experts may fall the other way, in a row or two of 90, which are then of another model.
    """
    prompt, alone = reference(path, kv_dtype)
    with opened(path, config(kv_dtype, n_threads)) as stage:
        logits = run_prompt(stage, PROMPT, PAGES, 16)
        errors, alone_errors = relative_errors(logits, prompt), relative_errors(singles(stage), alone)
    if not is_float and any(isinstance(op, RouteExperts) for op in graph_of(path).ops):
        kept = np.argsort(errors)[:-2]
        errors, prompt, logits = errors[kept], prompt[kept], logits[kept]
    exact = 5e-6 if kv_dtype == "f32" else 3e-4
    assert np.median(alone_errors) < exact
    assert max(errors.max(), alone_errors.max()) < (exact if is_float else 4e-2)
    assert kl(prompt, logits).max() < (1e-7 if is_float else 5e-3)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kv_dtype", ["f32", "f16"])
def test_every_type_equals_the_reference(kind: str, kv_dtype: str, tiny_model: TinyModel) -> None:
    arch = ARCHITECTURES[TYPES.index(kind) % 4]
    check_against_reference(tiny_model(arch, kind), kv_dtype, 2, is_float=is_exact(kind))


@pytest.mark.parametrize(
    "isa, kv_dtype",
    [(isa, kv) for kv in ("bf16", "q8_0") for isa in ISAS] + [(ISAS[0], kv) for kv in ("q8_0,f16", "f32,q8_0")],
)
def test_narrow_caches_equal_the_reference(
    isa: str, kv_dtype: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code halfway between two may fall either way here too: a step of bfloat16 is 2^-8, one of Q8_0 1/127 of the largest."""
    monkeypatch.setenv("PYINFER_ISA", isa)
    path = tiny_model("qwen3", "F32", shape=TinyShape(head_dim=64))
    prompt, alone = reference(path, kv_dtype)
    with opened(path, config(kv_dtype, 2)) as stage:
        logits, single = run_prompt(stage, PROMPT, PAGES, 16), singles(stage)
        chunked = run_prompt(stage, PROMPT, PAGES[::-1], 16, 7)
    np.testing.assert_array_equal(chunked, logits)
    assert np.median(relative_errors(single, alone)) < 1e-3
    assert relative_errors(logits, prompt).max() < 2e-2
    exact, _ = reference(path, "f32")
    assert 1e-4 < relative_errors(logits, exact).max() < 0.2  # and it is a narrow cache


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind, kv_dtype", [("F32", "f32"), ("Q4_1", "f16"), (mixed, "f16")])
def test_every_architecture_on_every_isa(
    isa: str, arch: str, kind: str, kv_dtype: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYINFER_ISA", isa)
    n_threads = 1 + ARCHITECTURES.index(arch) % 3
    check_against_reference(tiny_model(arch, kind), kv_dtype, n_threads, is_float=is_exact(kind))


@pytest.mark.parametrize(
    "arch, shape",
    [
        ("llama", TinyShape(tied=True)),
        ("llama", TinyShape(n_kv_heads=1, head_dim=48)),
        ("qwen3", TinyShape(n_heads=6, n_kv_heads=3, head_dim=80, n_ff=160)),
        ("gemma3", TinyShape(n_heads=2, n_kv_heads=1, head_dim=256, n_embd=96)),
        ("llama", TinyShape(n_experts=3, n_used=1)),
        ("qwen3moe", TinyShape(n_experts=33, n_used=9, n_ff=96)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_other_shapes_equal_the_reference(arch: str, shape: TinyShape, kind: str, tiny_model: TinyModel) -> None:
    check_against_reference(tiny_model(arch, kind, shape=shape), "f32", 3, is_float=is_exact(kind))


# ---- bit-equality: a row never depends on how it was run
BY_MODEL = pytest.mark.parametrize(
    "arch, kind, kv_dtype",
    [
        ("llama", "Q4_1", "f16"),
        ("llama", "BF16", "f16"),
        ("qwen2", "F16", "f32"),
        ("qwen3", mixed, "f16"),
        ("gemma3", "Q8_0", "f16"),
    ],
)


@BY_MODEL
def test_threads_and_chunks_change_no_bit(arch: str, kind: str, kv_dtype: str, tiny_model: TinyModel) -> None:
    path = tiny_model(arch, kind)
    with opened(path, config(kv_dtype)) as stage:
        whole = run_prompt(stage, LONG, PAGES, 16)
    for n_threads in (1, 2, 3):
        with opened(path, config(kv_dtype, n_threads)) as stage:
            for chunk in (1, 7, 16, 64, None):
                logits = run_prompt(stage, LONG, PAGES[::-1], 16, chunk)
                np.testing.assert_array_equal(logits, whole, err_msg=f"{n_threads} threads, chunks of {chunk}")


@pytest.mark.parametrize("arch, kind", [("qwen2moe", "Q8_0"), ("qwen3moe", mixed), ("qwen3moe", "F32")])
def test_experts_equal_the_reference_in_any_chunks(arch: str, kind: str, tiny_model: TinyModel) -> None:
    """On one ISA: test_experts runs the ops on all of them."""
    path = tiny_model(arch, kind)
    check_against_reference(path, "f16", 3, is_float=is_exact(kind))
    with opened(path, config()) as stage:
        whole = run_prompt(stage, LONG, PAGES, 16)
    for n_threads in (1, 3):
        with opened(path, config(n_threads=n_threads)) as stage:
            for chunk in (1, 7, 64, None):
                logits = run_prompt(stage, LONG, PAGES[::-1], 16, chunk)
                np.testing.assert_array_equal(logits, whole, err_msg=f"{n_threads} threads, chunks of {chunk}")


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sharing_out_a_long_sequence_changes_no_bit(arch: str, tiny_model: TinyModel) -> None:
    """Six partitions of 256 positions: more threads than KV heads cut them into spans."""
    path = tiny_model(arch, "Q8_0")
    rng = np.random.RandomState(8)
    ids, pages = rng.randint(0, 300, 1490).tolist(), rng.permutation(94).tolist()
    tail = [(1480, 1), (1481, 3), (1484, 6)]
    results = []
    for n_threads in (1, 4):
        with opened(path, config(n_threads=n_threads, n_pages=94, n_ctx=1504)) as stage:
            for start in range(0, 1480, 370):
                stage.run(make_batch([Piece(ids[start : start + 370], pages, start)], 16, []))
            batches = [make_batch([Piece(ids[start : start + n], pages, start)], 16) for start, n in tail]
            results.append(np.concatenate([stage.run(batch).copy() for batch in batches]))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("isa", ISAS)
@BY_MODEL
def test_company_changes_no_bit(
    isa: str, arch: str, kind: str, kv_dtype: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight sequences at different places of their lives, prompts beside decodes, against each by itself."""
    monkeypatch.setenv("PYINFER_ISA", isa)
    rng = np.random.RandomState(8)
    sequences = [rng.randint(0, 300, n).tolist() for n in (60, 1, 33, 17, 59, 16, 48, 5)]
    tables = [ALL_PAGES[4 * i : 4 * i + 4] for i in range(8)]
    with opened(tiny_model(arch, kind), config(kv_dtype, 2)) as stage:
        alone = [run_prompt(stage, ids, ALL_PAGES[40:], 16) for ids in sequences]
        done = [0] * 8
        while any(done[i] < len(ids) for i, ids in enumerate(sequences)):
            active = [i for i in rng.permutation(8) if done[i] < len(sequences[i]) and rng.rand() < 0.8]
            sizes = [min(int(rng.choice([1, 1, 5, 20])), len(sequences[i]) - done[i]) for i in active]
            if not active:
                continue
            pieces = [
                Piece(sequences[i][done[i] : done[i] + n], tables[i], done[i])
                for i, n in zip(active, sizes, strict=True)
            ]
            rows = np.split(stage.run(make_batch(pieces, 16)), np.cumsum(sizes)[:-1])
            for i, n, logits in zip(active, sizes, rows, strict=True):
                np.testing.assert_array_equal(logits, alone[i][done[i] : done[i] + n])
                done[i] += n


@pytest.mark.parametrize("block_size", [32, 64])
def test_page_sizes_change_no_bit(block_size: int, tiny_model: TinyModel) -> None:
    path = tiny_model("gemma3", "Q8_0")
    with opened(path, config()) as stage:
        expected = run_prompt(stage, PROMPT, PAGES, 16)
    with opened(path, config(block_size=block_size)) as stage:
        np.testing.assert_array_equal(run_prompt(stage, PROMPT, PAGES[:8], block_size, 50), expected)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("chunk", [1, 23, 300])
def test_groups_of_layers_change_no_bit(chunk: int, n_threads: int, tiny_model: TinyModel) -> None:
    """Full and sliding layers with pages of their own from one pool; nothing behind the window is read."""
    graph = graph_of(tiny_model("gemma3", "Q8_0"))
    grouped = replace(graph, kv_groups=group_layers(graph.kv_layers))
    full, sliding = grouped.kv_groups
    assert full.window is None and sliding.window == 8
    stage = CPUBackend().open_stage(graph, config(n_threads=n_threads))
    expected = run_prompt(stage, PROMPT, PAGES, 16)
    stage.close()
    n = len(PAGES)
    stage = CPUBackend().open_stage(grouped, config(n_threads=n_threads, n_pages=2 * n))
    for start in range(0, len(PROMPT), chunk):
        first = max(0, start - 7) // 16
        odd = [*range(0, 2 * first, 2), *range(2 * first + 1, 2 * n, 2)]
        piece = Piece(PROMPT[start : start + chunk], [list(range(0, 2 * n, 2)), odd], start)
        logits = stage.run(make_batch([piece], 16))
        np.testing.assert_array_equal(logits, expected[start : start + chunk])
    stage.close()


# ---- rows, pages and limits
def test_only_the_wanted_rows_come_back(tiny_model: TinyModel) -> None:
    with opened(tiny_model("llama", "Q8_0"), config(n_threads=2)) as stage:
        every = run_prompt(stage, PROMPT, PAGES, 16)
        for rows in ([0, 3, 88, 89], [89], list(range(0, 90, 2)), []):
            some = stage.run(make_batch([Piece(PROMPT, PAGES)], 16, outputs=rows))
            assert some.shape == (len(rows), 300)
            np.testing.assert_array_equal(some, every[rows])


def test_a_copied_page_continues_like_its_source(tiny_model: TinyModel) -> None:
    with opened(tiny_model("gemma3", "Q4_0"), config(n_threads=2)) as stage:
        expected = run_prompt(stage, PROMPT[:40], [0, 1, 2], 16)[30:]
        stage.run(make_batch([Piece(PROMPT[:30], [0, 1])], 16))
        stage.copy_page(1, 9)
        stage.run(make_batch([Piece(LONG[:16], [1])], 16))  # the source's page goes to somebody else
        copied = stage.run(make_batch([Piece(PROMPT[30:40], [0, 9, 5], 30)], 16))
        np.testing.assert_array_equal(copied, expected)


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
@pytest.mark.parametrize("backend", [CPUBackend(), ReferenceBackend()], ids=["cpu", "reference"])
def test_pages_that_were_in_host_memory_continue_like_those_that_stayed(
    tiny_model: TinyModel, backend: Backend, kv_dtype: str
) -> None:
    graph = graph_of(tiny_model("gemma3", "Q4_0"))
    stage = backend.open_stage(graph, config(kv_dtype, n_threads=2))
    stage.run(make_batch([Piece(PROMPT[:30], [3, 8])], 16))
    expected = stage.run(make_batch([Piece(PROMPT[30:40], [3, 8, 5], 30)], 16)).copy()
    data = stage.read_pages([3, 8])
    assert data.dtype == np.uint8 and data.shape == (2, kv_page_bytes(graph, 16, kv_dtype))
    stage.run(make_batch([Piece(LONG[:48], [8, 3, 9])], 16))  # their places go to somebody else
    stage.write_pages([9], data[1:])
    stage.write_pages([6], data[:1])
    np.testing.assert_array_equal(stage.run(make_batch([Piece(PROMPT[30:40], [6, 9, 5], 30)], 16)), expected)
    stage.close()


def test_hundreds_of_steps_in_a_row(tiny_model: TinyModel) -> None:
    """Greedy decoding of three sequences, with one thread and with two."""

    def decode(n_threads: int) -> list[list[int]]:
        with opened(tiny_model("qwen3", "Q8_0"), config(n_threads=n_threads)) as stage:
            tokens = [[1], [2], [3]]
            for position in range(300):
                pieces = [Piece([ids[-1]], ALL_PAGES[20 * i : 20 * i + 20], position) for i, ids in enumerate(tokens)]
                for ids, row in zip(tokens, stage.run(make_batch(pieces, 16)), strict=True):
                    ids.append(int(row.argmax()))
            return tokens

    first = decode(1)
    assert decode(2) == first
    assert len({token for ids in first for token in ids}) > 10


def test_a_step_may_be_as_large_as_the_limits(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", "Q8_0")
    sizes: dict[str, Any] = {"max_tokens": 40, "max_sequences": 6, "n_ctx": 100, "n_pages": 8}
    with opened(path, config(n_threads=2, **sizes)) as stage:
        expected = run_prompt(stage, LONG[:100], PAGES_OF_8, 16, chunk=40)  # the last token is the context's last
        np.testing.assert_array_equal(run_prompt(stage, LONG[:100], PAGES_OF_8, 16, chunk=33), expected)
        six = [Piece(LONG[: 7 - i // 4], [i]) for i in range(6)]
        assert sum(len(piece.ids) for piece in six) == 40
        rows = stage.run(make_batch(six, 16))
        assert rows.shape == (40, 300)
        np.testing.assert_array_equal(rows[:7], expected[:7])
        with pytest.raises(AssertionError):
            stage.run(make_batch([Piece(LONG[:41], PAGES_OF_8)], 16))
        with pytest.raises(AssertionError):
            stage.run(make_batch([Piece([1], [i]) for i in range(7)], 16))
        np.testing.assert_array_equal(run_prompt(stage, LONG[:100], PAGES_OF_8, 16, chunk=40), expected)


PAGES_OF_8 = [3, 0, 7, 1, 2, 6, 4]


def test_two_stages_live_side_by_side(tiny_model: TinyModel) -> None:
    paths = [tiny_model("llama", "Q8_0"), tiny_model("gemma3", "F32")]
    expected = []
    for path in paths:
        with opened(path, config()) as stage:
            expected.append(run_prompt(stage, PROMPT, PAGES, 16))
    with opened(paths[0], config(n_threads=2)) as first, opened(paths[1], config(n_threads=2)) as second:
        for _ in range(3):
            np.testing.assert_array_equal(run_prompt(first, PROMPT, PAGES, 16, 8), expected[0])
            np.testing.assert_array_equal(run_prompt(second, PROMPT, PAGES, 16, 8), expected[1])


def test_closing_joins_the_threads_and_may_be_repeated(tiny_model: TinyModel) -> None:
    stage = CPUBackend().open_stage(graph_of(tiny_model("llama", "Q8_0")), config(n_threads=3))
    threads = list(stage._pool._threads)
    assert len(threads) == 2 and all(thread.is_alive() for thread in threads)
    stage.close()
    assert not any(thread.is_alive() for thread in threads)
    stage.close()
    with pytest.raises(AssertionError):
        run_prompt(stage, PROMPT, PAGES, 16)


def test_repacked_weights_are_kept_and_read_again(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyinfer.kernels_cpu.repack_cache.repack_dir", lambda: tmp_path)
    path = tiny_model("llama", mixed)
    kept = config(n_threads=2, repack_cache=1 << 30, weights_id="these files")
    results = []
    for chosen in (config(n_threads=2), kept):
        with opened(path, chosen) as stage:
            results.append(run_prompt(stage, PROMPT, PAGES, 16))
    assert len(list(tmp_path.glob("*.weights"))) == 1

    def load(*_: object) -> None:
        raise AssertionError("repacked again")

    monkeypatch.setattr("pyinfer.kernels_cpu.weights.WeightArena.load", load)
    with opened(path, kept) as stage:
        results.append(run_prompt(stage, PROMPT, PAGES, 16))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    with pytest.raises(AssertionError, match="repacked again"), opened(path, replace(kept, weights_id="other files")):
        pass


def test_opening_tells_its_progress(tiny_model: TinyModel) -> None:
    seen: list[tuple[str, float]] = []
    graph = graph_of(tiny_model("llama", "Q8_0"))
    CPUBackend().open_stage(graph, config(), lambda what, share: seen.append((what, share))).close()
    shares = [share for what, share in seen if what == "loading weights"]
    assert shares == sorted(shares) and shares[-1] == 1.0 and all(0 <= share <= 1 for share in shares)


# ---- what cannot be run is said
@pytest.mark.parametrize("block_size", [0, 1, 8, 24, 48, 128])
def test_page_sizes_without_kernels(block_size: int, tiny_model: TinyModel) -> None:
    with pytest.raises(ConfigError, match=f"block_size is {block_size}; the CPU"):
        CPUBackend().open_stage(graph_of(tiny_model("llama", "Q8_0")), config(block_size=block_size))


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512"])
def test_an_unknown_isa(name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYINFER_ISA", name)
    with pytest.raises(ConfigError, match=name):
        CPUBackend().open_stage(graph_of(tiny_model("llama", "Q8_0")), config())


@pytest.mark.parametrize(
    "arch, shape",
    [
        ("llama", TinyShape(n_embd=64, n_ff=72)),
        ("llama", TinyShape(n_embd=72, head_dim=16)),
        ("llama", TinyShape(n_embd=64, head_dim=8)),
        ("qwen3", TinyShape(n_embd=64, head_dim=24)),
    ],
    ids=str,
)
def test_widths_without_kernels_are_a_model_error(arch: str, shape: TinyShape, tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match="multiple of"):
        CPUBackend().open_stage(graph_of(tiny_model(arch, "F32", shape=shape)), config())
