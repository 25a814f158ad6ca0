"""What llama.cpp answers about quantizing, recorded, and the models that it was asked about.

To record anew (llama-cpp-python 0.3.36's llama.cpp): `PYTHONPATH=.:tests/support python
tests/support/llamacpp_quantize.py LLAMA_CPP_BIN SMOLLM2.gguf STORIES_F32.gguf`, where the folder holds llama-quantize,
llama-imatrix, llama-perplexity and libggml-base.so.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.convert.file_types import FILE_TYPES
from pyinfer.convert.importance_matrix import ImportanceMatrix
from pyinfer.convert.type_plan import ModelShape, TensorSpec
from pyinfer.quant.codecs import codec_by_name
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.writer import write_gguf

DATA = Path(__file__).parents[1] / "data"
PLANS = DATA / "llamacpp_type_plans.json.xz"
ANSWERS = DATA / "llamacpp_quantize.json"
TEXT = DATA / "king_james.txt"
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WITH_IMATRIX = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", *SEARCHED)
EXACT_FILES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # nothing in them is searched for
IMATRIX_CTX, IMATRIX_CHUNKS = 64, 3
PERPLEXITY_CTX, PERPLEXITY_CHUNKS = 256, 6
F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PlanCase:
    """A model whose types llama-quantize was asked for; only names and shapes count."""

    n_layers: int
    n_embd: int = 256
    n_ff: int = 512
    n_heads: int = 8
    n_kv_heads: int = 2
    n_experts: int = 0
    tied: bool = False
    has_imatrix: bool = False

    @property
    def model(self) -> ModelShape:
        return ModelShape(self.n_layers, self.n_heads, self.n_kv_heads, self.n_experts, "llama")

    @property
    def specs(self) -> list[TensorSpec]:
        d, kv = self.n_embd, self.n_embd // self.n_heads * self.n_kv_heads
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, d), "output_norm.weight": (d,)}
        if not self.tied:
            shapes["output.weight"] = (64, d)
        for i in range(self.n_layers):
            layer: dict[str, tuple[int, ...]] = {
                "attn_norm": (d,), "ffn_norm": (d,),
                "attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, d),
            }  # fmt: skip
            experts = (self.n_experts,) if self.n_experts else ()
            end = "_exps" if experts else ""
            if experts:
                layer["ffn_gate_inp"] = (self.n_experts, d)
            layer |= {f"ffn_gate{end}": (*experts, self.n_ff, d), f"ffn_up{end}": (*experts, self.n_ff, d)}
            layer[f"ffn_down{end}"] = (*experts, d, self.n_ff)
            shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        return [TensorSpec(name, shape, "F32") for name, shape in shapes.items()]


CASES = {
    "llama": PlanCase(26, n_kv_heads=4),
    "grouped": PlanCase(32),
    "70B": PlanCase(80, n_embd=64, n_ff=64),
    "mixtral": PlanCase(16, n_experts=8, n_ff=256),
    "experts": PlanCase(9, n_experts=4, n_ff=256),
    "tied": PlanCase(30, tied=True),
    "narrow": PlanCase(6, n_embd=288, n_ff=768, n_heads=6, n_kv_heads=6),
    "odd": PlanCase(4, n_embd=272, n_ff=800, tied=True),
    "imatrix": PlanCase(24, has_imatrix=True),
}


def sample_weights() -> tuple[F32Array, F32Array]:
    """(weights (24, 768), importances (768,)): normal, with heavier tails, with outliers in columns, and far from 0."""
    rng = np.random.RandomState(7)  # frozen: the same numbers in every NumPy
    weights = rng.standard_normal((24, 768))
    weights[8:16] = rng.standard_t(4, (8, 768))
    weights[12:20, ::61] *= 6
    weights[20:] += 1.5
    importances = np.exp(rng.standard_normal(768) * 1.5)
    return (weights * 0.03).astype(np.float32), importances.astype(np.float32)


def error(weights: F32Array, restored: F32Array, importances: F32Array | None) -> float:
    """Mean squared error, of each column as much as it matters."""
    squares = (restored.astype(np.float64) - weights) ** 2
    return float(squares.mean() if importances is None else (squares * importances).mean() / importances.mean())


def tensor_digest(path: Path) -> str:
    """Of the types and bytes of all tensors of a file, in the order of their names."""
    digest = hashlib.sha256()
    with GGUFFile.open(path) as file:
        for name, tensor in sorted(file.tensors.items()):
            digest.update(f"{name} {tensor.codec.name} {tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor.data).data)
    return digest.hexdigest()


def _record_files(tools: Path, stories: Path, scratch: Path) -> dict[str, str]:
    digests = {}
    for name in EXACT_FILES:
        out = scratch / "out.gguf"
        command = [str(tools / "llama-quantize"), str(stories), str(out), name]
        subprocess.run(command, check=True, capture_output=True)
        digests[name] = tensor_digest(out)
    return digests


def _record_plans(tools: Path, scratch: Path) -> dict[str, Any]:
    plans: dict[str, Any] = {}
    for name, case in CASES.items():
        path, imatrix = scratch / "case.gguf", scratch / "imatrix.gguf"
        _write_case(path, case)
        matrices = {s.name: s.shape[-1] for s in case.specs if len(s.shape) > 1}
        ImportanceMatrix(
            {key: np.ones((1, n), np.float32) for key, n in matrices.items()},
            {key: np.ones(1, np.float32) for key in matrices},
            ("text",), 1, 1,
        ).save(imatrix)  # fmt: skip
        extra = ["--imatrix", str(imatrix)] if case.has_imatrix else []
        plans[name] = {}
        for target in FILE_TYPES:
            command = [str(tools / "llama-quantize"), "--dry-run", *extra, str(path), target, "1"]
            output = subprocess.run(command, capture_output=True, text=True, check=True)
            found = re.findall(
                r"^\[ *\d+/ *\d+\] (\S+) .*type = +(\w+), size = [^(\n]*(?:\((\w+)\))?$",
                output.stdout + output.stderr,
                re.M,
            )
            plans[name][target] = {tensor: (new or old).upper() for tensor, old, new in found}
    return plans


def _write_case(path: Path, case: PlanCase) -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": case.n_layers,
        "llama.context_length": 64,
        "llama.embedding_length": case.n_embd,
        "llama.feed_forward_length": case.n_ff,
        "llama.attention.head_count": case.n_heads,
        "llama.attention.head_count_kv": case.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": case.n_embd // case.n_heads,
        "llama.vocab_size": 64,
        "tokenizer.ggml.model": "no_vocab",
    }
    if case.n_experts:
        metadata |= {"llama.expert_count": case.n_experts, "llama.expert_used_count": 2}
    tensors = {}
    for spec in case.specs:
        rows = int(np.prod(spec.shape[:-1], dtype=np.int64))
        tensors[spec.name] = ("F32", spec.shape, np.zeros((rows, 4 * spec.shape[-1]), np.uint8))
    write_gguf(path, metadata, tensors)


def _record_errors(tools: Path) -> dict[str, dict[str, float]]:
    library = ctypes.CDLL(str(tools / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weights, importances = sample_weights()
    errors: dict[str, dict[str, float]] = {"plain": {}, "imatrix": {}}
    for kind, names in (("plain", SEARCHED), ("imatrix", WITH_IMATRIX)):
        for name in names:
            codec = codec_by_name(name)
            out = np.zeros((len(weights), codec.row_bytes(weights.shape[1])), np.uint8)
            matrix = importances.ctypes.data if kind == "imatrix" else None
            quantize(codec.type_id, weights.ctypes.data, out.ctypes.data, 0, *weights.shape, matrix)
            restored = codec.dequantize(out)
            errors[kind][name] = error(weights, restored, importances if matrix else None)
    return errors


def _record_imatrix(tools: Path, model: Path, scratch: Path) -> dict[str, list[float]]:
    """Some columns' mean squares of some matrices."""
    path = scratch / "imatrix.gguf"
    command = [
        str(tools / "llama-imatrix"), "-m", str(model), "-f", str(TEXT), "-o", str(path), "-c", str(IMATRIX_CTX),
        "-b", str(IMATRIX_CTX), "--chunks", str(IMATRIX_CHUNKS), "-t", "2",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    matrix = ImportanceMatrix.load(path)
    assert matrix.n_chunks == IMATRIX_CHUNKS
    found = {}
    for name in matrix.sums:
        columns = matrix.columns(name)
        assert columns is not None
        found[name] = [round(float(value), 8) for value in columns[0, ::96]]
    return found


def _record_perplexity(tools: Path, model: Path) -> float:
    command = [
        str(tools / "llama-perplexity"), "-m", str(model), "-f", str(TEXT), "-c", str(PERPLEXITY_CTX),
        "-b", str(PERPLEXITY_CTX), "--chunks", str(PERPLEXITY_CHUNKS), "-t", "2",
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    match = re.search(r"PPL = ([0-9.]+)", output.stdout + output.stderr)
    assert match is not None
    return float(match[1])


def main(tools: Path, model: Path, stories: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        PLANS.write_bytes(lzma.compress(json.dumps(_record_plans(tools, scratch)).encode(), preset=9))
        answers = {
            "errors": _record_errors(tools),
            "stories15M files": _record_files(tools, stories, scratch),
            "perplexity smollm2": _record_perplexity(tools, model),
            "imatrix smollm2": _record_imatrix(tools, model, scratch),
        }
    ANSWERS.write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
