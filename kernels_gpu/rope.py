"""Launches of `rope.cu`: angles once a step, then heads rotated and keys and values written into their pages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.launch import Buffer, Defines, Kernel, Launch
from pyinfer.kernels_gpu.pages import LayerPages
from pyinfer.kernels_gpu.step_buffer import StepFields

_SOURCE = "rope.cu"
_WARPS = 4
KV_TYPES = {"f32": 0, "f16": 1, "bf16": 2, "q8_0": 3}  # as kv.cuh counts them


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads of one attention layer and the pages that hold its keys and values."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    block_size: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each head before it is rotated (qwen3, gemma3): float32 [head_dim] weights."""

    q_weight: Buffer
    k_weight: Buffer
    eps: float


def rope_frequencies(rope: Rope) -> npt.NDArray[np.float64]:
    """What `build_rope_angles` reads: full circles a position, float64 [n_dims/2]."""
    return rope.frequencies() / (2 * math.pi)


def build_rope_angles(out: Buffer, rope: Rope, frequencies: Buffer, fields: StepFields, n_tokens: int) -> list[Launch]:
    """(cos, sin) of every token, float32 [n_tokens, n_dims/2, 2]: once a step for all layers of this rope."""
    n_pairs = rope.n_dims // 2
    threads = 32 * min(8, -(-n_pairs // 32))
    return [
        Launch(
            Kernel(_SOURCE, "rope_angles"),
            grid=(-(-n_pairs // threads), n_tokens, 1),
            block=(threads, 1, 1),
            args=(fields.positions, frequencies, n_pairs, rope.magnitude(), out),
            overlap=True,
        )
    ]


def build_rope_store(
    q_out: Buffer, q: Buffer, k: Buffer, v: Buffer, shape: HeadShape, rope: Rope, angles: Buffer, fields: StepFields,
    pages: LayerPages, n_tokens: int, norms: HeadNorms | None = None,
) -> list[Launch]:  # fmt: skip
    """q_out = q rotated (may be q), k rotated and v as it is into the pages; with `norms` heads are normalized first."""
    defines = (*_rope_defines(shape.head_dim, rope, norms is not None), *kv_defines(shape, pages))
    args = (
        q, norms.q_weight if norms else None, q_out, shape.n_heads, k, norms.k_weight if norms else None, v,
        shape.n_kv_heads, norms.eps if norms else 0.0, angles, fields.slots, *kv_args(pages),
    )  # fmt: skip
    return [_heads(defines, args, shape.n_heads + 2 * shape.n_kv_heads, n_tokens)]


def build_store(
    k: Buffer, v: Buffer, shape: HeadShape, fields: StepFields, pages: LayerPages, n_tokens: int
) -> list[Launch]:
    """k and v, as they are, into the pages."""
    defines: Defines = (
        ("HEAD", shape.head_dim), ("N_DIMS", 2), ("PAIRING", 0), ("NORM", 0), ("ROTATE", 0), ("WARPS", _WARPS),
        *kv_defines(shape, pages),
    )  # fmt: skip
    args = (None, None, None, 0, k, None, v, shape.n_kv_heads, 0.0, None, fields.slots, *kv_args(pages))
    return [_heads(defines, args, 2 * shape.n_kv_heads, n_tokens)]


def build_rope(
    out: Buffer, x: Buffer, width: int, head_dim: int, rope: Rope, angles: Buffer, n_tokens: int,
    weight: Buffer | None = None, eps: float = 0.0,
) -> list[Launch]:  # fmt: skip
    """out = x [n_tokens, width] with every head rotated (`out` may be x); with a weight heads are normalized first."""
    defines: Defines = (
        *_rope_defines(head_dim, rope, weight is not None), ("N_KV", 1), ("BLOCK", 1), ("K_TYPE", 0), ("V_TYPE", 0),
    )  # fmt: skip
    n_heads = width // head_dim
    args = (x, weight, out, n_heads, None, None, None, 0, float(eps), angles, None, None, None, None, None)
    return [_heads(defines, args, n_heads, n_tokens)]


def kv_defines(shape: HeadShape, pages: LayerPages) -> Defines:
    """What `kv.cuh` must know of the pages, beside HEAD."""
    return (
        ("N_KV", shape.n_kv_heads), ("BLOCK", shape.block_size),
        ("K_TYPE", KV_TYPES[pages.k_type]), ("V_TYPE", KV_TYPES[pages.v_type]),
    )  # fmt: skip


def kv_args(pages: LayerPages) -> tuple[Buffer | None, ...]:
    return pages.keys.codes, pages.keys.scales, pages.values.codes, pages.values.scales


def pairing_defines(rope: Rope, with_norm: bool) -> Defines:
    """What `rotate.cuh` must know, beside HEAD."""
    return ("N_DIMS", rope.n_dims), ("PAIRING", int(rope.pairing == "half")), ("NORM", int(with_norm))


def _rope_defines(head_dim: int, rope: Rope, with_norm: bool) -> Defines:
    return ("HEAD", head_dim), *pairing_defines(rope, with_norm), ("ROTATE", 1), ("WARPS", _WARPS)


def _heads(defines: Defines, args: tuple[Buffer | int | float | None, ...], n_heads: int, n_tokens: int) -> Launch:
    return Launch(
        Kernel(_SOURCE, "rope_store", defines),
        grid=(-(-n_heads // _WARPS), n_tokens, 1),
        block=(32 * _WARPS, 1, 1),
        args=args,
        overlap=True,
    )
