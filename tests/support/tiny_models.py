"""Tiny random models as GGUF files: every architecture, every weight type, a vocabulary that llama.cpp and we can load.

Tests say `from tiny_models import write_tiny_model` (pytest's `pythonpath` names this folder) or take the fixture
`tiny_model`. The default is a llama with 2 layers, 64 columns (256 for types whose block is that long), 4 query and
2 key heads and 300 tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.writer import write_gguf

CodecChoice = str | Callable[[str], str]  # one type for every matrix, or tensor name -> type
Rng = np.random.Generator | np.random.RandomState
N_VOCAB = 300
END, IM_START, IM_END = 297, 298, 299  # ids of <|end|>, <|im_start|>, <|im_end|>
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny model; None means: taken from the weight type's block."""

    n_layers: int = 2
    n_embd: int | None = None
    n_ff: int | None = None
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int | None = None
    n_ctx: int = 512
    tied: bool = False
    n_experts: int | None = None  # None: none, and 6 in architectures that cannot be without
    n_used: int = 2

    def filled(self, block: int) -> TinyShape:
        n_embd = self.n_embd or max(64, block)
        return dataclasses.replace(
            self, n_embd=n_embd, n_ff=self.n_ff or 2 * n_embd, head_dim=self.head_dim or n_embd // self.n_heads
        )


def random_weights(codec_name: str, rows: int, cols: int, rng: Rng, std: float) -> npt.NDArray[np.uint8]:
    """Bytes (rows, row bytes) of random weights of about this standard deviation.

    Float types hold normal values; block types hold random bytes under scales that are set, so that every code occurs.
    """
    codec = codec_by_name(codec_name)
    if codec.block_size == 1:
        return codec.quantize(rng.normal(0, std, (rows, cols)))
    assert cols % codec.block_size == 0, f"{cols} columns are no multiple of {codec_name}'s block"
    n_blocks = rows * cols // codec.block_size
    blocks = np.frombuffer(rng.bytes(n_blocks * codec.block_bytes), np.uint8).reshape(n_blocks, -1).copy()

    def put(offset: int, value: float) -> None:
        jitter = rng.uniform(0.8, 1.25, n_blocks) * value
        blocks[:, offset : offset + 2] = jitter.astype("<f2").view(np.uint8).reshape(-1, 2)

    if codec_name == "Q8_0":
        put(0, std / 74)
    elif codec_name in ("Q4_0", "Q5_0"):
        put(0, std / (4.6 if codec_name == "Q4_0" else 9.2))
    elif codec_name in ("Q4_1", "Q5_1"):
        top = 15 if codec_name == "Q4_1" else 31
        put(0, std * 3.4 / top)
        put(2, -std * 1.7)
    elif codec_name in ("Q4_K", "Q5_K"):
        top = 15 if codec_name == "Q4_K" else 31
        put(0, std * 3.4 / (36 * top))
        put(2, std * 1.7 / 36)
        blocks[:, 8:12] = blocks[:, 4:8]  # the mins equal the scales: mean zero
        blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17
    elif codec_name == "Q6_K":
        put(208, std / (18.5 * 74))
    elif codec_name == "Q2_K":
        put(80, std / 9.9)
        put(82, std / 6.6)
        blocks[:, :16] = (blocks[:, :16] & 15) * 17
    elif codec_name == "Q3_K":
        put(108, std / (18.5 * 2.3))
    else:
        raise ValueError(f"no random weights for {codec_name}")
    return blocks.reshape(rows, -1)


def tiny_vocabulary() -> dict[str, Any]:
    """Metadata of a byte-level BPE vocabulary of 300 tokens: 256 bytes, 41 merges, three control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letter = {byte: chr(byte if byte in printable else next(spare)) for byte in range(256)}
    tokens = [letter[byte] for byte in range(256)]
    pairs = [(letter[32], b) for b in "taoishwb"] + [(a, b) for a in "etaoi" for b in "etaoinshr"]
    merges = [f"{a} {b}" for a, b in pairs[: END - 256]]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|end|>", "<|im_start|>", "<|im_end|>"]
    assert len(tokens) == len(set(tokens)) == N_VOCAB
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array([1] * END + [3] * 3, np.int32),
        "tokenizer.ggml.bos_token_id": END,
        "tokenizer.ggml.eos_token_id": IM_END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def write_tiny_model(
    path: Path,
    arch: str = "llama",
    codec: CodecChoice = "Q8_0",
    *,
    shape: TinyShape | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    vectors: Mapping[str, npt.NDArray[np.float32]] | None = None,
    omit: tuple[str, ...] = (),
) -> Path:
    """Write a random model of `arch` and return its path.

    `metadata` adds to or replaces keys (None removes one), `vectors` adds or replaces F32 vectors such as
    "rope_freqs.weight" or "blk.0.attn_q.bias", `omit` leaves tensors out.
    """
    choose = codec if callable(codec) else lambda _name: codec
    names = {choose(name) for name in ("token_embd.weight", "output.weight", *_matrix_names(0))}
    s = (shape or TinyShape()).filled(max(codec_by_name(name).block_size for name in names))
    assert s.n_embd and s.n_ff and s.head_dim
    rng = np.random.RandomState(seed)  # its stream is frozen: logits stored in tests/data stay valid
    n_experts = s.n_experts or (6 if arch.endswith("moe") else 0)
    tensors: dict[str, tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]] = {}

    def matrix(name: str, rows: int, cols: int, std: float, *experts: int) -> None:
        data = random_weights(choose(name), rows * math.prod(experts), cols, rng, std)
        tensors[name] = (choose(name), (*experts, rows, cols), data)

    def vector(name: str, values: npt.NDArray[Any]) -> None:
        tensors[name] = ("F32", values.shape, values.astype("<f4").view(np.uint8).reshape(1, -1))

    def norm(name: str, width: int) -> None:
        vector(name, rng.uniform(0.5, 1.5, width))

    def experts(prefix: str, end: str, n_ff: int, *experts: int) -> None:
        assert s.n_embd
        matrix(f"{prefix}ffn_gate{end}", n_ff, s.n_embd, s.n_embd**-0.5, *experts)
        matrix(f"{prefix}ffn_up{end}", n_ff, s.n_embd, s.n_embd**-0.5, *experts)
        matrix(f"{prefix}ffn_down{end}", s.n_embd, n_ff, n_ff**-0.5, *experts)

    matrix("token_embd.weight", N_VOCAB, s.n_embd, 1.0 if arch != "gemma3" else s.n_embd**-0.5)
    norm("output_norm.weight", s.n_embd)
    if not s.tied and arch != "gemma3":
        matrix("output.weight", N_VOCAB, s.n_embd, 2 * s.n_embd**-0.5)
    q_width, kv_width = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    for i in range(s.n_layers):
        b = f"blk.{i}."
        norm(b + "attn_norm.weight", s.n_embd)
        norm(b + "ffn_norm.weight", s.n_embd)
        if arch == "phi3":
            matrix(b + "attn_qkv.weight", q_width + 2 * kv_width, s.n_embd, s.n_embd**-0.5)
        else:
            matrix(b + "attn_q.weight", q_width, s.n_embd, s.n_embd**-0.5)
            matrix(b + "attn_k.weight", kv_width, s.n_embd, s.n_embd**-0.5)
            matrix(b + "attn_v.weight", kv_width, s.n_embd, s.n_embd**-0.5)
        matrix(b + "attn_output.weight", s.n_embd, q_width, q_width**-0.5)
        if arch == "phi3":
            matrix(b + "ffn_up.weight", 2 * s.n_ff, s.n_embd, s.n_embd**-0.5)
            matrix(b + "ffn_down.weight", s.n_embd, s.n_ff, s.n_ff**-0.5)
        elif n_experts:
            vector(b + "ffn_gate_inp.weight", rng.normal(0, 2 * s.n_embd**-0.5, (n_experts, s.n_embd)))
            experts(b, "_exps.weight", s.n_ff, n_experts)
        else:
            experts(b, ".weight", s.n_ff)
        if arch == "qwen2moe":
            vector(b + "ffn_gate_inp_shexp.weight", rng.normal(0, s.n_embd**-0.5, s.n_embd))
            experts(b, "_shexp.weight", s.n_embd)
        if arch in ("qwen2", "qwen2moe"):
            for name, width in (("attn_q", q_width), ("attn_k", kv_width), ("attn_v", kv_width)):
                vector(f"{b}{name}.bias", rng.normal(0, 0.3, width))
        if arch in ("qwen3", "qwen3moe", "gemma3"):
            norm(b + "attn_q_norm.weight", s.head_dim)
            norm(b + "attn_k_norm.weight", s.head_dim)
        if arch == "gemma3":
            norm(b + "post_attention_norm.weight", s.n_embd)
            norm(b + "post_ffw_norm.weight", s.n_embd)
    for name, values in (vectors or {}).items():
        vector(name, values)
    for name in omit:
        del tensors[name]
    keys = {**_architecture_keys(arch, s, n_experts), **tiny_vocabulary(), **(metadata or {})}
    write_gguf(path, {key: value for key, value in keys.items() if value is not None}, tensors)
    return path


def _matrix_names(layer: int) -> list[str]:
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return [f"blk.{layer}.{kind}.weight" for kind in kinds]


def _architecture_keys(arch: str, s: TinyShape, n_experts: int) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": f"tiny {arch}",
        f"{arch}.block_count": s.n_layers,
        f"{arch}.context_length": s.n_ctx,
        f"{arch}.embedding_length": s.n_embd,
        f"{arch}.feed_forward_length": s.n_ff,
        f"{arch}.attention.head_count": s.n_heads,
        f"{arch}.attention.head_count_kv": s.n_kv_heads,
        f"{arch}.attention.key_length": s.head_dim,
        f"{arch}.attention.value_length": s.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0 if arch != "gemma3" else 1_000_000.0,
    }
    if n_experts:
        keys |= {f"{arch}.expert_count": n_experts, f"{arch}.expert_used_count": s.n_used}
    if arch.endswith("moe"):
        assert s.n_ff and s.n_embd
        keys |= {f"{arch}.feed_forward_length": 3 * s.n_ff, f"{arch}.expert_feed_forward_length": s.n_ff}
    if arch == "qwen2moe":
        keys["qwen2moe.expert_shared_feed_forward_length"] = s.n_embd
    if arch == "llama":
        keys["llama.rope.dimension_count"] = s.head_dim
    if arch == "phi3":
        keys["phi3.rope.dimension_count"] = s.head_dim
        keys["general.name"] = "tiny phi"  # in one named phi3, llama.cpp looks for tokens of the real one
    if arch == "gemma3":
        keys["gemma3.attention.sliding_window"] = 8
        keys["gemma3.attention.sliding_window_pattern"] = 2  # so that two layers hold both kinds
    return keys


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(arch="llama", codec="Q8_0", **options of write_tiny_model)` -> path; equal calls share one file."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[str, Path] = {}

    def get(arch: str = "llama", codec: str = "Q8_0", **options: Any) -> Path:
        key = repr((arch, codec, sorted(options.items())))
        if key not in written:
            written[key] = write_tiny_model(folder / f"{len(written)}-{arch}-{codec}.gguf", arch, codec, **options)
        return written[key]

    return get
