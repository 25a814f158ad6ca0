"""A model in F16 whose weights are on no grid, made of a quantized one: something to quantize where no original is at hand.

python benchmarks/smooth_model.py IN.gguf OUT.gguf [--seed 0]

Quantized weights lie on a few levels a block, so quantizing them again says little about a search. Every weight gets noise
spread evenly over one step of its block's grid, which is where its original was: the result is a model of its own, a little
worse than the source, with the statistics of a trained one. Rows that fill no block of 256 are padded with zeros, and norms
are scaled to make up for it, so that K types apply to all matrices (llama and gemma3, whose width is not a head's number
times its size).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.tensor import QuantTensor
from pyinfer.quant.writer import TensorSource, write_gguf

_BLOCK = 256
_LEVELS = {"Q4_0": 16, "Q4_1": 16, "Q4_K": 16, "Q5_0": 32, "Q5_1": 32, "Q5_K": 32, "Q6_K": 64, "Q8_0": 256}
_INPUTS = ("token_embd", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "output")  # their columns are the width
_OUTPUTS = ("attn_output", "ffn_down")  # their rows are
_F16_MATRICES = 2


def smoothed(tensor: QuantTensor, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """float32 of the tensor's shape: each weight moved by up to half a step of its group of 32."""
    weights = tensor.dequantize()
    levels = _LEVELS.get(tensor.codec.name)
    if levels is None:
        return weights
    groups = weights.reshape(-1, 32)
    steps = (groups.max(axis=1) - groups.min(axis=1)) / (levels - 1)
    groups += steps[:, None] * (rng.random(groups.shape, np.float32) - np.float32(0.5))
    return weights


def widened(name: str, weights: npt.NDArray[np.float32], width: int, wide: int) -> npt.NDArray[np.float32]:
    """The tensor in a model of `wide` columns, of which those from `width` on are always zero."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    extra = wide - width
    if weights.ndim == 1:
        if len(weights) != width or not kind.endswith("norm"):
            return weights
        # a norm divides by the root of a mean, which the zeros lower; gemma's embeddings grow by as much with the width,
        # which what is added to them has to follow
        return np.pad(weights if kind.startswith("post_") else weights * np.float32(np.sqrt(width / wide)), (0, extra))
    if kind in _INPUTS:
        return np.pad(weights, ((0, 0), (0, extra)))
    return np.pad(weights, ((0, extra), (0, 0))) if kind in _OUTPUTS else weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="another model of the same kind")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with GGUFFile.open(args.source) as file:
        metadata: dict[str, Any] = dict(file.metadata)
        arch = metadata["general.architecture"]
        width = int(metadata[f"{arch}.embedding_length"])
        wide = -(-width // _BLOCK) * _BLOCK
        if wide != width:
            head = width // int(metadata[f"{arch}.attention.head_count"])
            metadata[f"{arch}.embedding_length"] = wide
            metadata.setdefault(f"{arch}.attention.key_length", head)
            metadata.setdefault(f"{arch}.attention.value_length", head)
            metadata[f"{arch}.attention.layer_norm_rms_epsilon"] *= width / wide
        metadata["general.file_type"] = 1
        tensors: dict[str, TensorSource] = {}
        for name, tensor in file.tensors.items():
            weights = widened(name, smoothed(tensor, rng), width, wide)
            if weights.ndim < _F16_MATRICES:
                tensors[name] = ("F32", weights.shape, weights[np.newaxis].view(np.uint8))
            else:
                tensors[name] = ("F16", weights.shape, weights.astype(np.float16).view(np.uint8))
        write_gguf(args.output, metadata, tensors)


if __name__ == "__main__":
    main()
