"""The shortest job first, by predicted length (SSJF, arXiv:2404.08509): the least mean latency."""

from __future__ import annotations

from pyinfer.runtime.length_predictor import LengthPredictor
from pyinfer.runtime.request import Sequence


class ShortestJobFirst:
    """See `policy.Policy`. A job's length is that of its prompt and its answer, in steps."""

    takes_priority = False

    def __init__(self, predictor: LengthPredictor, max_tokens: int) -> None:
        self._predictor = predictor
        self._max_tokens = max_tokens

    def rank(self, sequence: Sequence) -> float:
        request = sequence.request
        most = sequence.limit - len(sequence.tokens)
        n_steps = self._predictor.remaining(request.route, sequence.n_prompt, sequence.n_output, most)
        return n_steps + len(sequence.tokens) / self._max_tokens
