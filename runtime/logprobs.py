"""Log-probabilities of tokens under raw logits."""

from __future__ import annotations

import math

import numpy as np

from pyinfer.graph.ops import F32Array
from pyinfer.runtime.outputs import Logprob, TokenLogprobs
from pyinfer.runtime.sample_filters import head


def token_logprobs(row: F32Array, token: int, n: int) -> TokenLogprobs:
    """`token`'s entry first, then the n most likely tokens' (n = -1: everyone's) of `row`, float32 [n_vocab]."""
    largest = row.max()
    log_sum = float(largest) + math.log(float(np.exp(row - largest).sum()))
    rank = int(np.count_nonzero(row > row[token])) + 1
    result = {token: Logprob(float(row[token]) - log_sum, rank)}
    if n != 0:
        ids = head(row, row.size if n < 0 else n)
        for i, (other, logit) in enumerate(zip(ids.tolist(), row[ids].tolist(), strict=True)):
            if other != token:
                result[other] = Logprob(logit - log_sum, i + 1)
    return result
