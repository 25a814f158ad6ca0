"""Every value in a checkpoint's JSON files replaced by something odd: converted, or one clear error, never a crash."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_checkpoint import decoder_tensors, write_checkpoint
from special_vocab import CASES

from pyinfer.convert.conversion import plan_conversion
from pyinfer.errors import PyinferError

pytestmark = pytest.mark.unit

ODD: tuple[Any, ...] = (None, -1, 1.5, 10**30, "x", [], [1], {"a": 1})
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", "added_tokens.json")
_NORMS = ("self_attn.q_norm", "self_attn.k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_theta": 1e4},
}
_TOKENIZER_CONFIG = {
    "bos_token": {"content": "<s>"},
    "eos_token": "</s>",
    "add_bos_token": True,
    "added_tokens_decoder": {"299": {"content": "<x>", "special": True}},
    "chat_template": [{"name": "default", "template": "x"}],
    "add_prefix_space": True,
}


def _llama(folder: Path) -> None:
    write_checkpoint(
        folder,
        rope_scaling={**_LLAMA3, "original_max_position_embeddings": 64},
        head_dim=16,
        hidden_act="silu",
        tie_word_embeddings=False,
        quantization_config={},
    )


def _gemma(folder: Path) -> None:
    write_checkpoint(
        folder,
        decoder_tensors(norms=_NORMS),
        architecture="Gemma3ForCausalLM",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        sliding_window_pattern=6,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters=_GEMMA_ROPE,
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copied = copy.copy(value)
    copied[path[0]] = _replaced(value[path[0]], path[1:], by)
    return copied


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("write", [_llama, _gemma])
def test_odd_values(tmp_path: Path, write: Callable[[Path], None], name: str) -> None:
    write(tmp_path)
    contents: dict[str, Any] = {
        "tokenizer_config.json": _TOKENIZER_CONFIG,
        "tokenizer.json": CASES["bert" if write is _llama else "separator between"]["tokenizer.json"],
        "generation_config.json": {"top_k": 3, "temperature": 0.5},
        "added_tokens.json": {"<y>": 298},
    }
    for file, content in contents.items():
        (tmp_path / file).write_text(json.dumps(content))
    plan_conversion(tmp_path, "f32")
    original = json.loads((tmp_path / name).read_text())
    places = list(_places(original))
    for i, place in enumerate(places):
        for odd in ODD if len(places) < 60 else ODD[i % 2 :: 2]:
            (tmp_path / name).write_text(json.dumps(_replaced(original, place, odd)))
            try:
                plan_conversion(tmp_path, "f32")
            except PyinferError as error:
                assert "\n" not in str(error)
            except Exception as error:
                pytest.fail(f"{name}: {odd!r} at {place}: {error!r}")
