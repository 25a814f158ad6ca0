"""Made-up workloads: random prompts, and random prompts behind a shared prefix.

Prompts are token ids, so that their lengths are exact. A chat takes text only: there the ids are decoded, and the
server counts a few tokens more or less, besides its template's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pyinfer.errors import ConfigError
from pyinfer.loadgen.openai_stream import Endpoint, LoadRequest
from pyinfer.loadgen.tokens import Tokenizer, ordinary_ids


@dataclass(frozen=True)
class RandomWorkload:
    """Lengths are drawn uniformly from [n * (1 - range_ratio), n * (1 + range_ratio)], at least 1."""

    input_len: int = 512  # of a request's own tokens
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0  # tokens before them that requests share
    n_prefixes: int = 1  # different ones, taken in turn

    def make(self, n: int, ids: Sequence[int], seed: int) -> list[LoadRequest]:
        """n requests of tokens out of `ids`; the same seed gives the same requests."""
        rng = random.Random(seed)
        prefixes = [rng.choices(ids, k=self.prefix_len) for _ in range(self.n_prefixes)]
        requests = []
        for i in range(n):
            n_input, n_output = self._length(rng, self.input_len), self._length(rng, self.output_len)
            prompt = prefixes[i % self.n_prefixes] + rng.choices(ids, k=n_input)
            requests.append(LoadRequest(prompt, len(prompt), n_output))
        return requests

    def _length(self, rng: random.Random, mean: int) -> int:
        spread = int(mean * self.range_ratio)
        return max(1, rng.randint(mean - spread, mean + spread))


async def random_requests(
    workload: RandomWorkload, n: int, tokenizer: Tokenizer, endpoint: Endpoint, seed: int
) -> list[LoadRequest]:
    """n requests in the form that the endpoint takes."""
    requests = workload.make(n, await ordinary_ids(tokenizer, seed), seed)
    return [await _as_text(request, tokenizer) for request in requests] if endpoint == "chat" else requests


async def _as_text(request: LoadRequest, tokenizer: Tokenizer) -> LoadRequest:
    assert isinstance(request.prompt, list)
    return LoadRequest(await tokenizer.decode(request.prompt), request.n_prompt, request.n_output)


@dataclass(frozen=True)
class LengthLimits:
    """Which exchanges of a conversation file are used; the bounds are vLLM's."""

    min_tokens: int = 4  # of the prompt, and of the reply
    max_prompt: int = 1024
    max_total: int = 2048

    def allow(self, n_prompt: int, n_reply: int) -> bool:
        is_long_enough = min(n_prompt, n_reply) >= self.min_tokens
        return is_long_enough and n_prompt <= self.max_prompt and n_prompt + n_reply <= self.max_total


async def conversation_requests(
    exchanges: Sequence[tuple[str, str]],
    n: int,
    tokenizer: Tokenizer,
    seed: int,
    *,
    limits: LengthLimits | None = None,
    output_len: int | None = None,
) -> list[LoadRequest]:
    """n requests out of (prompt, reply) texts in an order drawn by `seed`; each asks for its reply's length.

    `output_len` takes the place of the replies' lengths. ConfigError if fewer than n are usable.
    """
    limits = limits or LengthLimits()
    order = list(range(len(exchanges)))
    random.Random(seed).shuffle(order)
    requests: list[LoadRequest] = []
    for index in order:
        if len(requests) == n:
            break
        prompt, reply = exchanges[index]
        n_prompt = len(await tokenizer.encode(prompt))
        n_reply = output_len or len(await tokenizer.encode(reply, add_special=False))
        if limits.allow(n_prompt, n_reply):
            requests.append(LoadRequest(prompt, n_prompt, n_reply))
    if len(requests) < n:
        raise ConfigError(
            f"{len(requests)} of the file's {len(exchanges)} conversations are usable and {n} are needed, warm-up "
            "included; give a larger file or a smaller --num-prompts",
            param="num_prompts",
        )
    return requests
