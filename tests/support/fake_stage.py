"""A model without weights whose "keys and values" are the token ids themselves.

It stores each token at its slots, and reads a sequence's tokens back through the page tables: logits are a hash of what
it finds there, so a wrong slot, table, position or shared page shows up as other tokens. A KV group with a window reads
what is inside it, and each group only what it stored itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import PageData, StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.graph.kv_groups import KVGroup

N_VOCAB = 61
ONE_GROUP = (KVGroup((0,)),)
END = 7  # the only end-of-generation token


_OTHER = 1 << 32  # between what two groups store for one token


@dataclass
class FakeVocabulary:
    """Characters are tokens: code point modulo the vocabulary."""

    n_vocab: int = N_VOCAB
    eog_ids: frozenset[int] = field(default_factory=lambda: frozenset({END}))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return [ord(c) % self.n_vocab for c in text]


class FakeStage:
    def __init__(
        self,
        config: StageConfig,
        n_vocab: int = N_VOCAB,
        *,
        groups: Sequence[KVGroup] = ONE_GROUP,
        checks: bool = True,
    ) -> None:
        rng = np.random.default_rng(0)
        self.config = config
        self.n_vocab = n_vocab
        self.windows = [group.window for group in groups]
        self.checks = checks
        self.kv = np.full(config.n_pages * config.block_size, -1, np.int64)
        self.weights = rng.integers(1, 2**62, 4096, dtype=np.uint64) | np.uint64(1)
        self.logits = rng.standard_normal((1024, n_vocab)).astype(np.float32) * 2
        self.n_steps = 0
        self.n_tokens = 0
        self.fail_at: int | None = None  # raise in this step
        self.closed = False

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.n_steps += 1
        self.n_tokens += batch.n_tokens
        block_size = self.config.block_size
        if self.checks:
            batch.check(
                n_vocab=self.n_vocab,
                n_pages=self.config.n_pages,
                block_size=block_size,
                n_groups=len(self.windows),
            )
            assert batch.n_tokens <= self.config.max_tokens and batch.n_sequences <= self.config.max_sequences
        if self.fail_at == self.n_steps:
            raise RuntimeError("the device fell over")
        for group, slots in enumerate(batch.slots):
            self.kv[slots] = batch.token_ids.astype(np.int64) + group * _OTHER
        out = np.empty((len(batch.output_rows), self.n_vocab), np.float32)
        owners = np.searchsorted(batch.sequence_starts, batch.output_rows, side="right") - 1
        for i, (row, owner) in enumerate(zip(batch.output_rows.tolist(), owners.tolist(), strict=True)):
            out[i] = self.logits_after(self._read(batch, owner, int(batch.positions[row]) + 1))
        return out

    def _read(self, batch: Batch, owner: int, n: int) -> npt.NDArray[np.int64]:
        """The first n tokens of a sequence, -1 where no group sees them, less where two groups or their pages disagree."""
        block_size = self.config.block_size
        seen = np.zeros(n, np.int64)
        for group, window in reversed(list(enumerate(self.windows))):
            # what the sequence's first token in this step sees, as all of it must be there
            low = 0 if window is None else max(0, int(batch.positions[batch.sequence_starts[owner]]) + 1 - window)
            first = low // block_size
            pages = batch.page_tables[group, owner, first : -(-n // block_size)].astype(np.int64)
            slots = (pages[:, None] * block_size + np.arange(block_size)).reshape(-1)
            tokens = self.kv[slots[low - first * block_size : n - first * block_size]] - group * _OTHER
            agree = (tokens >= 0) & ((seen[low:] == 0) | (seen[low:] == tokens + 1))
            seen[low:] = np.where(agree, tokens + 1, -1000)
        return seen - 1

    def logits_after(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What follows these tokens, [n_vocab]: any change of a token or of the order gives other logits.

        Tokens that no group sees are -1, whatever they are.
        """
        if None not in self.windows:
            tokens = np.where(np.arange(len(tokens)) < len(tokens) - max(w or 0 for w in self.windows), -1, tokens)
        return self.logits[int((tokens.astype(np.uint64) * self.weights[: len(tokens)]).sum() >> np.uint64(20)) % 1024]

    def copy_page(self, source: int, target: int) -> None:
        pages = self.kv.reshape(-1, self.config.block_size)
        pages[target] = pages[source]

    def read_pages(self, pages: Sequence[int]) -> PageData:
        return self.kv.reshape(-1, self.config.block_size)[list(pages)].view(np.uint8)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        self.kv.reshape(-1, self.config.block_size)[list(pages)] = data.view(np.int64)

    def close(self) -> None:
        self.closed = True
