"""Perplexity and KL divergence of models whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_models import TinyShape, write_tiny_model

from pyinfer.errors import RequestError
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.activation_sums import activation_sums
from pyinfer.runtime.perplexity import compare, measure, text_chunks

pytestmark = pytest.mark.unit

F32Array = npt.NDArray[np.float32]


class FixedModel:
    """Gives every token the same probabilities, whatever came before."""

    def __init__(self, probabilities: Sequence[float], offset: float = 0.0) -> None:
        self._row = np.log(np.array(probabilities, np.float32)) + np.float32(offset)

    def logits(self, token_ids: Sequence[int], /) -> F32Array:
        return np.tile(self._row, (len(token_ids), 1))


def tokenizer(n_tokens: int, add_bos: bool) -> Any:
    return SimpleNamespace(encode=lambda text: list(range(n_tokens)), add_bos=add_bos, bos_id=99)


def test_uniform_model_is_as_perplexed_as_it_has_tokens() -> None:
    result = measure(FixedModel([0.2] * 5, offset=30.0), [[0, 1, 2, 3, 4, 0, 1, 2]] * 2)
    assert result.value == pytest.approx(5, rel=1e-6)
    assert result.n_tokens == 2 * 3  # of 8 tokens those after the fifth
    assert result.error == pytest.approx(0, abs=1e-6)


def test_only_the_second_half_counts() -> None:
    model = FixedModel([0.5, 0.25, 0.25])
    result = measure(model, [[2, 2, 2, 2, 2, 0, 0, 1]])
    assert result.value == pytest.approx(math.exp(-(2 * math.log(0.5) + math.log(0.25)) / 3), rel=1e-6)
    nll = np.array([math.log(2), math.log(2), math.log(4)])
    assert result.error == pytest.approx(result.value * nll.std() / math.sqrt(2), rel=1e-5)


def test_distance_of_two_models() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    told: list[int] = []
    result = compare(FixedModel(p.tolist()), FixedModel(q.tolist()), [[0] * 8] * 3, lambda done, _: told.append(done))
    assert result.kl_divergence.mean == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert result.max_kl_divergence == pytest.approx(result.kl_divergence.mean)
    assert result.top1_agreement.mean == 0
    assert result.base.value == pytest.approx(2) and result.model.value == pytest.approx(5)
    assert told == [1, 2, 3]


def test_a_model_is_no_distance_from_itself() -> None:
    model = FixedModel([0.1, 0.2, 0.3, 0.4])
    result = compare(model, model, [list(range(4)) * 20])
    assert result.kl_divergence.mean == result.max_kl_divergence == 0
    assert result.top1_agreement.mean == 1 and result.base == result.model


def test_chunks_start_with_bos_if_the_model_wants_it() -> None:
    assert text_chunks(tokenizer(10, add_bos=False), "", 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert text_chunks(tokenizer(13, add_bos=True), "", 4, max_chunks=2) == [[99, 1, 2, 3], [99, 5, 6, 7]]


def test_texts_too_short() -> None:
    with pytest.raises(RequestError, match=r"has 7 tokens.*take 8.*at most 3"):
        text_chunks(tokenizer(7, add_bos=False), "", 4)
    with pytest.raises(RequestError, match="at least 4"):
        text_chunks(tokenizer(7, add_bos=False), "", 3)


def test_a_matrix_that_is_used_in_parts_is_counted_once(tmp_path: Path) -> None:
    chunks = [list(range(16))] * 2
    with GGUFFile.open(write_tiny_model(tmp_path / "m.gguf", "phi3", "F32")) as file:
        sums = activation_sums(file, chunks)
    assert {int(n[0]) for n in sums.n_rows.values()} == {32}
    assert {"blk.0.attn_qkv.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"} <= sums.squares.keys()


def test_activation_sums_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = np.random.default_rng(0).integers(0, 200, (5, 24)).tolist()
    with GGUFFile.open(write_tiny_model(tmp_path / "tiny.gguf", codec="F32")) as file:
        whole = activation_sums(file, chunks)
        monkeypatch.setattr("pyinfer.runtime.activation_sums._TOKENS_AT_ONCE", 48)
        parts = activation_sums(file, chunks)
        matrices = {n for n, t in file.tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    assert whole.squares.keys() == matrices
    assert {int(n[0]) for n in whole.n_rows.values()} == {5 * 24}
    for name, values in whole.squares.items():
        np.testing.assert_allclose(parts.squares[name], values, rtol=1e-4)
    assert whole.squares["blk.0.attn_q.weight"] is not whole.squares["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(whole.squares["blk.0.attn_q.weight"], whole.squares["blk.0.attn_v.weight"])
    assert not np.array_equal(whole.squares["blk.0.attn_q.weight"], whole.squares["blk.0.ffn_up.weight"])


def test_experts_have_sums_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = np.random.default_rng(0).integers(0, 200, (3, 24)).tolist()
    shape = TinyShape(n_experts=7, n_used=3)
    with GGUFFile.open(write_tiny_model(tmp_path / "m.gguf", "qwen3moe", "F32", shape=shape)) as file:
        sums = activation_sums(file, chunks)
        monkeypatch.setattr("pyinfer.runtime.activation_sums._TOKENS_AT_ONCE", 24)
        parts = activation_sums(file, chunks)
    for i in range(2):
        gate, up, down = (f"blk.{i}.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
        counts = sums.n_rows[gate]
        assert counts.shape == (7,) and counts.sum() == 3 * 3 * 24 and len(set(counts)) > 2
        for name in (up, down):
            np.testing.assert_array_equal(sums.n_rows[name], counts)
        # every token's row goes to the router once, and to three experts
        router = sums.squares[f"blk.{i}.ffn_gate_inp.weight"]
        np.testing.assert_allclose(sums.squares[gate].sum(0), 3 * router[0], rtol=1e-6)
        assert sums.squares[gate].shape == (7, 64) and sums.squares[down].shape == (7, 128)
        for name in (gate, down):
            np.testing.assert_array_equal(parts.n_rows[name], sums.n_rows[name])
            np.testing.assert_allclose(parts.squares[name], sums.squares[name], rtol=1e-4, atol=1e-6)
