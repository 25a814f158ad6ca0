"""How much the kernels of many rows have to do, for `gpu_limits.py`: products on the tensor cores, prompts' attention, rows.

cuBLAS is taken to fill tiles of 128 x 256 results with wgmma, a whole wave of them at `_GEMM_FLOPS`; a library of NVIDIA's that
nobody can count. Rows between products are taken to come from device memory, though some are still in the L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from gpu_work import Share, StepFacts, Work, declared, n_warps

from pyinfer.kernels_gpu.launch import Gemm, Launch
from pyinfer.kernels_gpu.mma_tiling import chunk_row_bytes
from pyinfer.kernels_gpu.weights_layout import layout_of

_GEMM_FLOPS = 760e12  # float16 with float32 sums where nothing is left over; 790e12 was measured for bfloat16
_GEMM_TILE = (128, 256)
_GEMM_FIXED = 3.0e-6  # it neither asks ahead nor lets others start


def gemm_seconds(gemm: Gemm, n_sms: int, bandwidth: float) -> float:
    """Results are written while others are multiplied; of few tiles the columns are cut too, which is taken to cost 40 %."""
    tiles = ceil(gemm.m / _GEMM_TILE[0]) * ceil(gemm.n / _GEMM_TILE[1])
    full = 2.0 * _GEMM_TILE[0] * _GEMM_TILE[1] * gemm.k * n_sms / _GEMM_FLOPS
    waves = ceil(tiles / n_sms) if tiles > n_sms / 2 else 1.4 * tiles / n_sms
    n_bytes = 2 * (gemm.m + gemm.n) * gemm.k + gemm.m * gemm.n * ((2 if gemm.halves else 4) << gemm.accumulate)
    return max(waves * full, n_bytes / bandwidth) + _GEMM_FIXED


def _args(launch: Launch, places: Sequence[int]) -> list[int]:
    return [int(launch.args[place] or 0) for place in places]  # type: ignore[arg-type]


@declared("matmul_mma")
def _matmul_mma(launch: Launch, facts: StepFacts) -> Work:
    """Every warp goes through its block's chunks; weights are read once, x and shared tiles stay in the L2."""
    d = dict(launch.kernel.defines)
    m, columns, n_units, share, *widths = _args(launch, (6, 7, 8, 9, 13, 17, 21))
    kind, warps = str(d["TYPE"]), int(d["WARPS"])
    units = int(d.get("UNITS", 2))
    packed = sum(part.row_bytes for part in layout_of(kind, 1, 256).parts) / 256
    n_bytes = sum(widths) * (columns * packed + 4 * m * (2 if launch.args[3] else 1))
    ring = (int(d["W_STAGES"]) - 1) * int(d["MT"]) * 16 * chunk_row_bytes(kind, units)
    tiles = launch.grid[0] * max(1.0, share / ceil(columns / (32 * units)))
    return Work(n_bytes, (Share(launch.kernel, float(n_units * warps), tiles * warps),), ring, True)


@declared("attention_prefill")
def _attention_prefill(launch: Launch, facts: StepFacts) -> Work:
    """One sequence: tiles of tokens, each over all positions up to its last."""
    d = {key: value for key, value in launch.kernel.defines if isinstance(value, int)}
    per_sequence = ceil(facts.n_tokens / facts.n_sequences)
    ends = [min(first + d["TOKENS"], per_sequence) for first in range(0, per_sequence, d["TOKENS"])]
    tiles = sum(ceil((facts.depth + end) / d["COLUMNS"]) for end in ends) * facts.n_sequences * launch.grid[1]
    n_bytes = 6.0 * facts.n_tokens * d["N_KV"] * d["PER_KV"] * d["HEAD"]
    n_bytes += 4.0 * (facts.depth * facts.n_sequences + facts.n_tokens) * d["N_KV"] * d["HEAD"]
    blocks = len(ends) * facts.n_sequences * launch.grid[1] * launch.grid[2]
    share = Share(launch.kernel, float(tiles * d["WARPS"]), float(blocks * d["WARPS"]))
    return Work(n_bytes, (share,), 4.0 * d["COLUMNS"] * d["HEAD"] / d["WARPS"], n_blocks=blocks)


def _rows(launch: Launch, n_rows: int, row_bytes: float) -> Work:
    share = Share(launch.kernel, 0.0, float(n_warps(launch)))
    return Work(n_rows * row_bytes, (share,), n_rows * row_bytes / n_warps(launch) / 2)


@declared("rms_norm")
def _rms_norm(launch: Launch, facts: StepFacts) -> Work:
    d = dict(launch.kernel.defines)
    bytes_a_column = 4 + (2 if d["OUT"] == 2 else 4) + (8 if d["BEFORE"] else 0)
    return _rows(launch, launch.grid[0], float(int(d["WIDTH"]) * bytes_a_column))


@declared("gated")
def _gated(launch: Launch, facts: StepFacts) -> Work:
    d = dict(launch.kernel.defines)
    return _rows(launch, launch.grid[1], float(int(d["WIDTH"]) * ((4 if d["GATED"] == "__half" else 8) + 2)))


@declared("matmul_finish")
def _matmul_finish(launch: Launch, facts: StepFacts) -> Work:
    return _rows(launch, launch.grid[1], float(int(launch.args[8] or 0) * (12 if launch.args[7] else 8)))  # type: ignore[arg-type]


@declared("rope_store")
def _rope_store(launch: Launch, facts: StepFacts) -> Work:
    """Queries from float32 to float32, keys and values to 16 bits."""
    d = dict(launch.kernel.defines)
    n_q, n_kv, head = int(launch.args[3] or 0), int(launch.args[7] or 0), int(d["HEAD"])  # type: ignore[arg-type]
    return _rows(launch, launch.grid[1], float(head * (8 * n_q + 12 * n_kv)))


@declared("dequantize")
def _dequantize(launch: Launch, facts: StepFacts) -> Work:
    kind = str(dict(launch.kernel.defines)["TYPE"])
    packed = sum(part.row_bytes for part in layout_of(kind, 1, 256).parts) / 256
    columns, rows = _args(launch, (2, 4))
    return _rows(launch, rows, columns * (packed + 2))
