"""The interpreter's pages, chunks, windows and numbers; what a whole model computes is checked elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from batches import Piece, make_batch, one_table, run_prompt
from tiny_models import write_tiny_model

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.kv_groups import group_layers
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceStage, activate, apply_rope, rms_norm
from pyinfer.graph.rope import Rope
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph

pytestmark = pytest.mark.unit

A = np.random.RandomState(1).randint(0, 300, 37).tolist()
B = np.random.RandomState(2).randint(0, 300, 21).tolist()


def open_stage(path: Path, kv_dtype: str = "f32", n_pages: int = 8) -> ReferenceStage:
    graph = one_table(optimize(build_graph(GGUFFile.open(path))))
    return ReferenceStage(graph, StageConfig(n_pages=n_pages, kv_dtype=kv_dtype))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_and_pages_change_nothing(arch: str, chunk: int, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", arch, "F32")
    whole = run_prompt(open_stage(path), A, [0, 1, 2], 16)
    parts = run_prompt(open_stage(path), A, [5, 0, 7], 16, chunk)
    np.testing.assert_allclose(parts, whole, atol=2e-5)


def test_sequences_of_one_batch_do_not_see_each_other(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "gemma3", "F32")
    stage = open_stage(path)
    stage.run(make_batch([Piece(A[:30], [3, 1, 6])], 16))  # A is decoding while B's prompt comes in
    together = stage.run(make_batch([Piece(A[30:], [3, 1, 6], 30), Piece(B, [2, 4])], 16))
    np.testing.assert_allclose(together[:7], run_prompt(open_stage(path), A, [0, 1, 2], 16)[30:], atol=2e-5)
    np.testing.assert_allclose(together[7:], run_prompt(open_stage(path), B, [0, 1], 16), atol=2e-5)


def test_only_the_wanted_rows_come_back(tmp_path: Path) -> None:
    stage = open_stage(write_tiny_model(tmp_path / "m.gguf", codec="F32"))
    every = stage.run(make_batch([Piece(A, [0, 1, 2])], 16)).copy()
    some = stage.run(make_batch([Piece(A, [0, 1, 2])], 16, outputs=[4, 36]))
    np.testing.assert_allclose(some, every[[4, 36]], atol=1e-5)
    assert stage.run(make_batch([Piece(A, [0, 1, 2])], 16, outputs=[])).shape == (0, 300)


def test_a_copied_page_continues_like_its_source(tmp_path: Path) -> None:
    stage = open_stage(write_tiny_model(tmp_path / "m.gguf", codec="F32"))
    stage.run(make_batch([Piece(A[:20], [0, 1])], 16))
    stage.copy_page(1, 5)
    own = stage.run(make_batch([Piece(A[20:25], [0, 1], 20)], 16)).copy()
    copied = stage.run(make_batch([Piece(A[20:25], [0, 5], 20)], 16))
    np.testing.assert_array_equal(copied, own)


def test_half_precision_keys_and_values_are_close_and_not_equal(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", codec="F32")
    exact, half = (run_prompt(open_stage(path, kv), A, [0, 1, 2], 16) for kv in ("f32", "f16"))
    assert 0 < np.abs(exact - half).max() < 0.01


def test_rms_norm_by_hand_and_by_head() -> None:
    x = np.array([[3, 4, 0, 0, 1, 1, 1, 1]], np.float32)
    weight = np.array([1, 2, 3, 4], np.float32)
    expected = [[3 / 2.5, 8 / 2.5, 0, 0, 1, 2, 3, 4]]
    np.testing.assert_allclose(rms_norm(x, weight, 0.0), expected, rtol=1e-6)


def test_rope_turns_pairs_by_the_position() -> None:
    x = np.array([[1, 0, 0, 0, 9]], np.float32)
    angle = 3.0
    position = np.array([3], np.int32)
    interleaved = apply_rope(x, 5, Rope(4, "interleaved", 10000.0), position)
    np.testing.assert_allclose(interleaved, [[math.cos(angle), math.sin(angle), 0, 0, 9]], atol=1e-6)
    half = apply_rope(x, 5, Rope(4, "half", 10000.0), position)
    np.testing.assert_allclose(half, [[math.cos(angle), 0, math.sin(angle), 0, 9]], atol=1e-6)


def test_activations_at_known_points() -> None:
    x = np.array([[-200, -1, 0, 1, 200]], np.float32)
    np.testing.assert_allclose(activate(x, "silu"), [[0, -0.26894143, 0, 0.7310586, 200]], rtol=1e-6)
    np.testing.assert_allclose(activate(x, "gelu_tanh"), [[0, -0.15880801, 0, 0.841192, 200]], rtol=1e-6)


def test_groups_of_layers_change_no_logit_and_pages_behind_a_window_are_not_read(tmp_path: Path) -> None:
    """Window 8, pages of 4: whatever the table says behind the window, and other pages for each group."""
    graph = one_table(build_graph(GGUFFile.open(write_tiny_model(tmp_path / "m.gguf", "gemma3"))))
    grouped = replace(graph, kv_groups=group_layers(graph.kv_layers))
    grouped.check()
    assert [group.window for group in grouped.kv_groups] == [None, 8]
    config = StageConfig(n_pages=20, kv_dtype="f32", block_size=4)
    expected = run_prompt(ReferenceStage(graph, config), A, range(10), 4)
    stage = ReferenceStage(grouped, config)
    pages = [[3, 1, 4, 15, 9, 2, 18, 11, 12, 13], [6, 5, 0, 7, 8, 10, 14, 16, 17, 19]]
    for start in range(0, len(A), 3):
        first = max(0, start - 7) // 4
        shown = [pages[0], [3] * first + pages[1][first:]]
        logits = stage.run(make_batch([Piece(A[start : start + 3], shown, start)], 4))
        np.testing.assert_allclose(logits, expected[start : start + 3], rtol=0, atol=1e-5)
