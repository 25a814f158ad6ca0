"""Golden data of real models: an exact float32 run over the dequantized weights, and how far llama.cpp is from it.

tests/data/golden_<model>.npz holds for each prompt: `<prompt>.ids`, `<prompt>.rows` (the positions kept),
`<prompt>.top_ids` and `<prompt>.top_logprobs` [rows, 64], and `<prompt>.llamacpp_kl`: llama.cpp's mean KL on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).parents[1] / "data"
MODELS = {"smollm2": "golden_smollm2.npz", "gemma3-270m": "golden_gemma3_270m.npz"}


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt; `rows` are the positions whose 64 likeliest next tokens are known."""

    name: str
    ids: list[int]
    rows: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int64]
    top_logprobs: npt.NDArray[np.float64]
    llamacpp_kl: float

    def max_error(self, logits: npt.NDArray[np.float32]) -> float:
        """Largest difference of a known logprob; `logits` [len(ids), n_vocab]."""
        return float(np.abs(self._logprobs(logits) - self.top_logprobs).max())

    def kl(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """KL(exact || logits) at each of `rows`, all other tokens taken as one (a little under the whole KL)."""
        ours = self._logprobs(logits)
        p, q = np.exp(self.top_logprobs), np.exp(ours)
        p_rest, q_rest = (np.maximum(1 - x.sum(1), 1e-12) for x in (p, q))
        return (p * (self.top_logprobs - ours)).sum(1) + p_rest * np.log(p_rest / q_rest)

    def _logprobs(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        x = logits[self.rows].astype(np.float64)
        x -= x.max(1, keepdims=True)
        x -= np.log(np.exp(x).sum(1, keepdims=True))
        return np.take_along_axis(x, self.top_ids, 1)


def golden_prompts(model: str) -> dict[str, GoldenPrompt]:
    """Prompt name -> its golden data, for a catalogue name."""
    with np.load(DATA / MODELS[model]) as data:
        names = sorted({key.partition(".")[0] for key in data.files})
        return {
            name: GoldenPrompt(
                name,
                data[f"{name}.ids"].tolist(),
                data[f"{name}.rows"].astype(np.int64),
                data[f"{name}.top_ids"].astype(np.int64),
                data[f"{name}.top_logprobs"].astype(np.float64),
                float(data[f"{name}.llamacpp_kl"]),
            )
            for name in names
        }
