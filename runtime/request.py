"""`Request` and its `Sequence`s: what the scheduler and the engine know of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from pyinfer.runtime.outputs import FloatMatrix, RequestMetrics, TokenLogprobs
from pyinfer.runtime.pages import page_digest, root_digest
from pyinfer.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pyinfer.runtime.beam_search import BeamSearch
    from pyinfer.runtime.page_moves import SwappedPages
    from pyinfer.runtime.sampler import SequenceSampler

NO_BLOCK = -1  # in a table: given back, as no window reaches it any more

Key = tuple[float, int, int]  # less is served first: rank, arrival, index


class State(Enum):
    WAITING = "waiting"  # holds no pages
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sample of a request: its tokens, how many of them are computed, and where.

    The scheduler owns `state`, `n_computed`, `tables`, `slot` and what belongs to them; the engine owns the rest.
    """

    __slots__ = (
        "cached_tokens",
        "coming_row",
        "digests",
        "firsts",
        "index",
        "is_paused",
        "key",
        "leader",
        "limit",
        "logits",
        "metrics",
        "n_coming",
        "n_computed",
        "n_due",
        "n_flying",
        "n_prompt",
        "n_remembered",
        "n_score_rows",
        "n_scored",
        "n_writable",
        "prompt_logprobs",
        "prompt_was_computed",
        "reads_cache",
        "request",
        "sampler",
        "slot",
        "state",
        "stop_ids",
        "swapped",
        "tables",
        "tokens",
        "wants_next",
    )

    def __init__(self, request: Request, index: int, *, limit: int, leader: Sequence | None = None) -> None:
        self.request = request
        self.index = index
        self.key: Key = (0.0, request.arrival_number, index)  # the scheduler sets the rank
        self.tokens = list(request.prompt)
        self.n_prompt = len(request.prompt)
        self.limit = limit  # ends when it has so many tokens
        self.leader = leader  # sample 0: computes the prompt, whose pages the others then share

        self.state = State.WAITING
        self.n_computed = (
            0  # tokens whose keys and values are in the pages, or will be once the steps in flight are over
        )
        self.n_flying = 0  # of those, the ones that are not there yet
        self.n_coming = 0  # tokens behind `tokens` that steps in flight will give
        self.coming_row = 0  # which of its step's tokens the last of them is
        # for each kind of layers: its blocks in the pool, NO_BLOCK before the first that is held
        self.tables: list[list[int]] = []
        self.firsts: list[int] = []  # for each kind, that first block
        self.n_writable = 0  # tokens that its blocks take; after a fork fewer, as others may hold the last one too
        self.n_due: float = 0  # computed tokens from which on there is more to do than to count them
        self.is_paused = False  # all is computed; waits for the other beams to choose its next token
        self.swapped: SwappedPages | None = None  # what it had computed when it gave way; while waiting
        self.slot = -1  # row in the engine's tables while running
        self.digests = [root_digest(request.salt)]  # digests[i + 1] is block i's
        self.n_remembered = 0  # blocks offered for reuse
        self.prompt_was_computed = False
        self.cached_tokens = 0  # of the prompt, when it first ran
        self.reads_cache = True

        self.n_score_rows = 0  # leading rows whose logits are wanted besides the sampled one
        self.n_scored = 0  # of those, done
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.logits: FloatMatrix | None = None  # what `Engine.logits` gathers
        self.wants_next = True  # the logits after its last token; False: only scored
        self.sampler: SequenceSampler | None = None
        self.stop_ids: frozenset[int] = frozenset()
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)

    @property
    def n_tokens(self) -> int:
        """Those that are known and those to come."""
        return len(self.tokens) + self.n_coming

    @property
    def n_output(self) -> int:
        return len(self.tokens) - self.n_prompt

    def page_digests(self, n: int, block_size: int) -> list[bytes]:
        """Digests of the first n blocks, which must be full of known tokens."""
        self.extend_digests(n, block_size)
        return self.digests[1 : n + 1]

    def extend_digests(self, n: int, block_size: int) -> None:
        """Those of the first n blocks are known from now on."""
        digests = self.digests
        for block in range(len(digests) - 1, n):
            digests.append(page_digest(digests[-1], self.tokens[block * block_size : (block + 1) * block_size]))

    @property
    def is_held(self) -> bool:
        """Waits for its leader to compute the prompt."""
        leader = self.leader
        return leader is not None and not leader.prompt_was_computed and leader.state is not State.FINISHED


class Request:
    """A prompt, its parameters and the sequences made from them."""

    __slots__ = ("arrival_number", "arrival_time", "beams", "id", "params", "prompt", "route", "salt", "sequences")

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        arrival_number: int,
        *,
        salt: str = "",
        route: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.arrival_number = arrival_number
        self.arrival_time = clock()
        self.salt = salt  # only requests of the same salt share pages
        self.route = route  # what kind of request it is; those of a kind have answers of like lengths
        self.sequences: list[Sequence] = []
        self.beams: BeamSearch | None = None

    @property
    def is_finished(self) -> bool:
        return all(sequence.state is State.FINISHED for sequence in self.sequences)
