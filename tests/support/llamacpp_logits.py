"""Tiny models whose logits llama.cpp has computed: every architecture and kind of rotary embedding.

The models are random F32 weights from a frozen stream, so only the logits are stored. To make them again, with
the extras `[test,peer]` installed: `PYTHONPATH=tests/support python tests/support/llamacpp_logits.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_models import TinyShape, write_tiny_model

DATA = Path(__file__).parents[1] / "data" / "tiny_llamacpp_logits.npz"  # case -> float32 [len(ROWS), 300]
PROMPT: list[int] = np.random.RandomState(7).randint(0, 300, 32).tolist()
ROWS = [0, 3, 9, 17, 31]

_WIDE = TinyShape(head_dim=32)
_FACTORS = np.concatenate([np.ones(6), np.linspace(1, 8, 4), np.full(6, 8.0)]).astype(np.float32)


def _scaling(arch: str, kind: str, **more: Any) -> dict[str, Any]:
    keys = {"type": kind, "factor": 4.0, "original_context_length": 64, **more}
    return {f"{arch}.rope.scaling.{key}": value for key, value in keys.items()}


def _biases() -> dict[str, npt.NDArray[np.float64]]:
    rng = np.random.RandomState(1)
    widths = {
        "attn_q": 64,
        "attn_k": 32,
        "attn_v": 32,
        "attn_output": 64,
        "ffn_gate": 128,
        "ffn_up": 128,
        "ffn_down": 64,
    }
    return {f"blk.{i}.{name}.bias": rng.normal(0, 0.5, width) for i in range(2) for name, width in widths.items()}


def _long_rope(original_context: int) -> dict[str, Any]:
    return {
        "shape": TinyShape(tied=True),
        "vectors": {
            "rope_factors_short.weight": np.linspace(1, 2, 8),
            "rope_factors_long.weight": np.linspace(1, 30, 8),
        },
        "metadata": {
            "phi3.rope.scaling.original_context_length": original_context,
            "phi3.rope.scaling.attn_factor": 1.2,
        },
    }


# case -> (architecture, options of write_tiny_model)
N_CTX = 512  # phi3's rotary embedding depends on it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"shape": TinyShape(tied=True)}),
    "llama biases": ("llama", {"vectors": _biases()}),
    "llama no key_length": (
        "llama",
        {"metadata": {"llama.attention.key_length": None, "llama.attention.value_length": None}},
    ),
    "llama one kv head": ("llama", {"shape": TinyShape(n_kv_heads=1)}),
    "llama rope_freqs": ("llama", {"shape": _WIDE, "vectors": {"rope_freqs.weight": _FACTORS}}),
    "llama linear": ("llama", {"shape": _WIDE, "metadata": _scaling("llama", "linear")}),
    "llama scale_linear": ("llama", {"shape": _WIDE, "metadata": {"llama.rope.scale_linear": 4.0}}),
    "llama scaling none": ("llama", {"shape": _WIDE, "metadata": _scaling("llama", "none")}),
    "llama yarn": ("llama", {"shape": _WIDE, "metadata": _scaling("llama", "yarn")}),
    # both ends of yarn's ramp lie inside the head
    "llama yarn ramp": (
        "llama",
        {
            "shape": _WIDE,
            "metadata": {
                **_scaling("llama", "yarn", original_context_length=1024),
                "llama.rope.freq_base": 500.0,
            },
        },
    ),
    "llama yarn attn_factor": ("llama", {"shape": _WIDE, "metadata": _scaling("llama", "yarn", attn_factor=0.8)}),
    "llama linear attn_factor": ("llama", {"shape": _WIDE, "metadata": _scaling("llama", "linear", attn_factor=0.8)}),
    "llama yarn rope_freqs": (
        "llama",
        {"shape": _WIDE, "metadata": _scaling("llama", "yarn"), "vectors": {"rope_freqs.weight": _FACTORS}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"metadata": _scaling("qwen2", "yarn")}),
    "qwen3": ("qwen3", {"shape": _WIDE}),
    "qwen3 yarn": ("qwen3", {"shape": _WIDE, "metadata": _scaling("qwen3", "yarn")}),
    "gemma3": ("gemma3", {}),
    "gemma3 default pattern": (
        "gemma3",
        {"shape": TinyShape(n_layers=7), "metadata": {"gemma3.attention.sliding_window_pattern": None}},
    ),
    "gemma3 pattern array": (
        "gemma3",
        {
            "shape": TinyShape(n_layers=3),
            "metadata": {"gemma3.attention.sliding_window_pattern": np.array([True, False, True])},
        },
    ),
    "gemma3 linear": (
        "gemma3",
        {"shape": _WIDE, "metadata": {**_scaling("gemma3", "linear"), "gemma3.rope.freq_base_swa": 5000.0}},
    ),
    "gemma3 no window": (
        "gemma3",
        {"metadata": {"gemma3.attention.sliding_window": None, "gemma3.attention.sliding_window_pattern": None}},
    ),
    "gemma3 half the head rotated": ("gemma3", {"metadata": {"gemma3.rope.dimension_count": 8}}),
    "phi3": ("phi3", {"metadata": {"phi3.attention.sliding_window": 0}}),
    "phi3 short factors": ("phi3", _long_rope(512)),
    "phi3 long factors": ("phi3", _long_rope(256)),
    "phi3 half the head rotated": ("phi3", {"metadata": {"phi3.rope.dimension_count": 8}}),
    "llama experts": ("llama", {"shape": TinyShape(n_experts=4)}),
    "llama one expert of three": ("llama", {"shape": TinyShape(n_experts=3, n_used=1)}),
    "qwen3moe": ("qwen3moe", {"shape": _WIDE}),
    "qwen3moe no width of experts": (
        "qwen3moe",
        {
            "shape": TinyShape(n_experts=20, n_used=5),
            "metadata": {"qwen3moe.feed_forward_length": 640, "qwen3moe.expert_feed_forward_length": None},
        },
    ),
    "qwen2moe": ("qwen2moe", {}),
    "gemma3 27b attention scale": ("gemma3", {"shape": TinyShape(n_layers=62, n_heads=2, head_dim=16)}),
}


def _llamacpp_logits(path: Path) -> npt.NDArray[np.float32]:
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=N_CTX, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )  # type 0: F32 keys and values
    model.eval(PROMPT)
    return np.array(model.scores[ROWS], np.float32)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.gguf"
        logits = {
            case: _llamacpp_logits(write_tiny_model(file, arch, "F32", **options))
            for case, (arch, options) in CASES.items()
        }
    np.savez_compressed(DATA, **logits)  # type: ignore[arg-type]
