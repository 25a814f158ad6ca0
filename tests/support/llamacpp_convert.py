"""What llama.cpp's converter makes of two real and some made-up checkpoints, and how llama.cpp then runs the real ones.

Stored: digests of every key and tensor that `convert_hf_to_gguf.py` writes, tokens and embeddings of llama.cpp on
these files. To make them again, with torch, transformers, sentencepiece and llama-cpp-python installed:
`PYTHONPATH=tests/support python tests/support/llamacpp_convert.py FOLDER`, the folder being llama.cpp's sources of the
same version.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import made_up_experts
import minilm
import numpy as np
import stories15m

from pyinfer.quant.gguf import GGUFFile

DATA = Path(__file__).parents[1] / "data"
DIGESTS = DATA / "llamacpp_convert.json"  # "stories15M f32" -> description of the file
ANSWERS = DATA / "llamacpp_convert.npz"  # "stories15M f32" -> ids, "minilm" -> embeddings
PROMPT = "Once upon a time, there was a"
N_GENERATED = 48
TYPES = ("f32", "f16", "bf16", "q8_0")


def describe(path: Path) -> dict[str, Any]:
    """Every key with its value (a digest, if it is long), every tensor with type, shape and digest."""
    with GGUFFile.open(path) as file:
        keys = {key: _plain(value) for key, value in sorted(file.metadata.items())}
        tensors = {
            name: [t.codec.name, list(t.shape), _digest(t.data.tobytes())] for name, t in sorted(file.tensors.items())
        }
    return {"keys": keys, "tensors": tensors}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.size} {_digest(value.tobytes())}"
    if isinstance(value, list):
        return f"list {len(value)} {_digest(json.dumps(value).encode())}"
    return value


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def convert_with_llamacpp(sources: Path, folder: Path, out: Path, type_name: str) -> Path:
    """Run llama.cpp's own converter."""
    command = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(folder.resolve()), "--outfile", str(out)]
    subprocess.run([*command, "--outtype", type_name], cwd=sources, check=True, capture_output=True)
    return out


def made_up_digests(sources: Path) -> dict[str, Any]:
    """Of the mixtures of experts in `made_up_experts`."""
    digests = {}
    for name, (write, type_name) in made_up_experts.STORED.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder, out = write(Path(scratch) / "tiny"), Path(scratch) / "out.gguf"
            digests[name] = describe(convert_with_llamacpp(sources, folder, out, type_name))
    return digests


def greedy_with_llamacpp(path: Path) -> list[int]:
    """The ids of `PROMPT` and its likeliest continuation."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)
    ids: list[int] = model.tokenize(PROMPT.encode(), add_bos=True)
    model.eval(ids)
    for _ in range(N_GENERATED):
        ids.append(int(np.argmax(model.scores[len(ids) - 1])))
        model.eval(ids[-1:])
    return ids


def logits_with_llamacpp(path: Path, ids: list[int], n_ctx: int = 256) -> minilm.F32Array:
    """float32 [len(ids), n_vocab], with float32 keys and values."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=n_ctx, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32)


def embed_with_llamacpp(path: Path) -> minilm.F32Array:
    """float32 [texts, 384], of length 1."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), embedding=True, n_ctx=256, n_threads=1, verbose=False)
    rows = np.array([model.embed(text) for text in minilm.TEXTS], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    from pyinfer.paths import home

    sources, cache = Path(sys.argv[1]), home() / "tests"
    digests: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = stories15m.write_hf_folder(Path(scratch) / "stories15M", stories15m.fetch(cache))
        out = Path(scratch) / "out.gguf"
        for type_name in TYPES:
            convert_with_llamacpp(sources, folder, out, type_name)
            digests[f"stories15M {type_name}"] = describe(out)
            answers[f"stories15M {type_name}"] = np.array(greedy_with_llamacpp(out), np.int32)
        convert_with_llamacpp(sources, minilm.fetch(cache), out, "f32")
        digests["minilm f32"] = describe(out)
        answers["minilm f32"] = embed_with_llamacpp(out)
        digests |= made_up_digests(sources)
    DIGESTS.write_text(json.dumps(digests, indent=0) + "\n")
    np.savez_compressed(ANSWERS, **answers)
