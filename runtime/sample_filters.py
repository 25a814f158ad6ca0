"""Sampling steps that cut a distribution's tail, and the draw from what is left.

Only a head of the vocabulary is ever sorted. `Candidates` are tokens by falling probability; among equal ones the lower
id comes first. Order: temperature, min_p, top_k, typical_p, top_p (each over what the one before left).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.ops import F32Array
from pyinfer.runtime.sampling_params import SamplingParams

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

_GROUPS = 32  # the vocabulary is folded so many times to find a bound on its k-th largest logit
_FIRST_HEAD = 128
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Candidates:
    ids: Ids
    weights: Weights  # exp((logit - largest logit) / temperature): proportional to probability
    total: float  # the weight of the whole distribution that these are the head of


def head(row: npt.NDArray[np.floating], k: int) -> Ids:
    """Ids of the k largest of `row`, [n_vocab], descending; ties by lower id. No full sort for small k."""
    n = row.size
    n_columns = n // _GROUPS
    if k * 4 <= n_columns:
        # the k-th largest column maximum: k columns hold something as large, so it bounds the k-th largest from below
        maxima = row[: n_columns * _GROUPS].reshape(_GROUPS, n_columns).max(axis=0)
        bound = np.partition(maxima, n_columns - k)[n_columns - k]
        ids = np.flatnonzero(row >= bound)
    elif k < n:
        bound = np.partition(row, n - k)[n - k]
        ids = np.flatnonzero(row >= bound)
    else:
        ids = np.arange(n)
    return ids[np.argsort(-row[ids], kind="stable")[:k]]


def _weigh(row: F32Array, ids: Ids, temperature: float, total: float | None = None) -> Candidates:
    logits = row[ids].astype(np.float64)
    weights = np.exp((logits - logits[0]) / temperature)
    return Candidates(ids, weights, float(weights.sum()) if total is None else total)


def _first(candidates: Candidates, n: int) -> Candidates:
    weights = candidates.weights[:n]
    return Candidates(candidates.ids[:n], weights, float(weights.sum()))


def min_p(candidates: Candidates, share: float) -> Candidates:
    """Drop what is less likely than `share` times the most likely (arXiv:2407.01082)."""
    return _first(candidates, int(np.count_nonzero(candidates.weights >= share * candidates.weights[0])))


def top_p(candidates: Candidates, share: float) -> Candidates:
    """The fewest most likely tokens that together hold `share` of the distribution (arXiv:1904.09751)."""
    n = int(np.searchsorted(np.cumsum(candidates.weights), share * candidates.total)) + 1
    return _first(candidates, n)


def typical_p(candidates: Candidates, share: float) -> Candidates:
    """The fewest tokens whose surprise is nearest to the entropy and that hold `share` (arXiv:2202.00666)."""
    p = candidates.weights / candidates.total
    surprise = -np.log(np.maximum(p, 1e-300))
    nearness = -np.abs(surprise - (p * surprise).sum())
    k = _FIRST_HEAD
    while True:
        nearest = head(nearness, k)
        held = np.cumsum(p[nearest])
        if k >= p.size or held[-1] >= share:
            break
        k *= 16
    kept = nearest[: int(np.searchsorted(held, share)) + 1]
    weights = candidates.weights[kept]
    order = np.argsort(-weights, kind="stable")
    return Candidates(candidates.ids[kept[order]], weights[order], float(weights.sum()))


def pick(weights: npt.NDArray[np.floating], u: float) -> int:
    """Index drawn in proportion to `weights` by inverting their running sum at u in [0, 1)."""
    running = np.cumsum(weights, dtype=np.float64)
    i = int(np.searchsorted(running, u * running[-1], side="right"))
    return i if i < weights.size else int(np.flatnonzero(weights)[-1])


def _pick_from_all(row: F32Array, temperature: float, u: float) -> int:
    """`pick` over a whole vocabulary in id order, by blocks: one running sum over the blocks, one inside a block."""
    weights = _all_weights(row, temperature)
    n_blocks = row.size // _BLOCK
    sums = weights[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).sum(axis=1, dtype=np.float64)
    running = np.cumsum(np.append(sums, weights[n_blocks * _BLOCK :].sum(dtype=np.float64)))
    target = u * running[-1]
    block = min(int(np.searchsorted(running, target, side="right")), n_blocks)
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    if not inside.any():  # only by rounding, past the last weight
        return int(np.flatnonzero(weights)[-1])
    before = float(running[block - 1]) if block else 0.0
    total = float(inside.sum(dtype=np.float64))
    return block * _BLOCK + pick(inside, min((target - before) / total, 1.0))


def _all_weights(row: F32Array, temperature: float) -> F32Array:
    weights: F32Array = row - row.max()
    if temperature != 1.0:
        weights *= np.float32(1.0 / temperature)
    np.exp(weights, out=weights)
    return weights


def draw(row: F32Array, params: SamplingParams, u: float) -> int:
    """A token from `row`, float32 [n_vocab], by the temperature and filters of `params`; u in [0, 1) decides."""
    temperature = params.temperature
    if 0 < params.top_k < row.size:
        candidates = _weigh(row, head(row, params.top_k), temperature)
    elif params.min_p > 0.0:
        bound = row.max() + temperature * math.log(params.min_p)
        ids = np.flatnonzero(row >= bound)
        candidates = _weigh(row, ids[np.argsort(-row[ids], kind="stable")], temperature)
    elif params.typical_p < 1.0:
        weights = _all_weights(row, temperature).astype(np.float64)
        candidates = Candidates(np.arange(row.size), weights, float(weights.sum()))
    elif params.top_p < 1.0:
        candidates = _enough(row, temperature, params.top_p)
    else:
        return _pick_from_all(row, temperature, u)
    if params.min_p > 0.0:
        candidates = min_p(candidates, params.min_p)
    if params.typical_p < 1.0:
        candidates = typical_p(candidates, params.typical_p)
    if params.top_p < 1.0:
        candidates = top_p(candidates, params.top_p)
    return int(candidates.ids[pick(candidates.weights, u)])


def _enough(row: F32Array, temperature: float, share: float) -> Candidates:
    """A head of the distribution that holds `share` of it."""
    total = float(_all_weights(row, temperature).sum(dtype=np.float64))
    k = _FIRST_HEAD
    while True:
        candidates = _weigh(row, head(row, k), temperature, total)
        if k >= row.size or candidates.weights.sum() >= share * total:
            return candidates
        k *= 16
