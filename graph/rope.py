"""Rotary position embedding (arXiv:2104.09864) with the scalings that GGUF models carry."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """How one kind of layer rotates its heads.

    The first `n_dims` columns of a head are rotated. "interleaved" pairs columns (2i, 2i+1), as GGUF's llama does after
    its q/k permutation; "half" pairs (i, i + n_dims/2), as NeoX does. Angle i of position p is p * frequencies()[i].
    """

    n_dims: int
    pairing: Literal["interleaved", "half"]
    base: float
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0  # context is `factor` times the original one
    original_context: int = 0  # of the model before scaling, for yarn
    attention_factor: float = 1.0  # extra factor on both cos and sin
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    frequency_factors: npt.NDArray[np.float32] | None = None  # [n_dims/2]: llama 3.1's, or longrope's short ones
    long_factors: npt.NDArray[np.float32] | None = None  # [n_dims/2]: longrope's beyond the original context

    def for_context(self, n_ctx: int) -> Rope:
        """The rotation that a context of `n_ctx` tokens takes: LongRoPE (arXiv:2402.13753) has two sets of factors."""
        if self.long_factors is None:
            return self
        is_long = n_ctx > self.original_context
        return replace(
            self, frequency_factors=self.long_factors if is_long else self.frequency_factors, long_factors=None
        )

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Radians per position, float64 [n_dims/2]."""
        i = np.arange(0, self.n_dims, 2, dtype=np.float64)
        freq: npt.NDArray[np.float64] = self.base ** (-i / self.n_dims)
        if self.frequency_factors is not None:
            freq = freq / self.frequency_factors.astype(np.float64)
        if self.scaling == "linear":
            return freq / self.factor
        if self.scaling == "yarn":
            return self._yarn(freq)
        return freq

    def _yarn(self, freq: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """YaRN (arXiv:2309.00071): high frequencies stay, low ones are interpolated, a ramp joins them."""

        def dim_of(rotations: float) -> float:
            return self.n_dims * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.base))

        low = max(0.0, math.floor(dim_of(self.beta_fast)))
        high = min(self.n_dims - 1.0, math.ceil(dim_of(self.beta_slow)))
        ramp: npt.NDArray[np.float64] = np.clip((np.arange(self.n_dims // 2) - low) / max(0.001, high - low), 0.0, 1.0)
        return freq / self.factor * ramp + freq * (1.0 - ramp)

    def magnitude(self) -> float:
        """Factor on cos and sin: the model's own attention factor, times yarn's 1 + 0.1 ln(factor)."""
        if self.scaling == "yarn" and self.factor > 1:
            return self.attention_factor * (1.0 + 0.1 * math.log(self.factor))
        return self.attention_factor

    def cos_sin(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Float32 [len(positions), n_dims/2, 2]: cos and sin, computed in float64."""
        angles = positions.astype(np.float64)[:, None] * self.frequencies()[None, :]
        out = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * self.magnitude()
        return out.astype(np.float32)
