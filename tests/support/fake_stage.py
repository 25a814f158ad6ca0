"""A model without weights whose "keys and values" are the token ids themselves.

It stores each token at its slot, and reads a sequence's tokens back through the page table: logits are a hash of what
it finds there, so a wrong slot, table, position or shared page shows up as other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import PageData, StageConfig
from pyinfer.graph.batch import Batch

N_VOCAB = 61
END = 7  # the only end-of-generation token


@dataclass
class FakeVocabulary:
    """Characters are tokens: code point modulo the vocabulary."""

    n_vocab: int = N_VOCAB
    eog_ids: frozenset[int] = field(default_factory=lambda: frozenset({END}))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return [ord(c) % self.n_vocab for c in text]


class FakeStage:
    def __init__(self, config: StageConfig, n_vocab: int = N_VOCAB, *, checks: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.config = config
        self.n_vocab = n_vocab
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
            batch.check(n_vocab=self.n_vocab, n_pages=self.config.n_pages, block_size=block_size)
            assert batch.n_tokens <= self.config.max_tokens and batch.n_sequences <= self.config.max_sequences
        if self.fail_at == self.n_steps:
            raise RuntimeError("the device fell over")
        self.kv[batch.slots[0]] = batch.token_ids
        out = np.empty((len(batch.output_rows), self.n_vocab), np.float32)
        owners = np.searchsorted(batch.sequence_starts, batch.output_rows, side="right") - 1
        for i, (row, owner) in enumerate(zip(batch.output_rows.tolist(), owners.tolist(), strict=True)):
            n = int(batch.positions[row]) + 1
            pages = batch.page_tables[0, owner, : -(-n // block_size)].astype(np.int64)
            slots = (pages[:, None] * block_size + np.arange(block_size)).reshape(-1)[:n]
            out[i] = self.logits_after(self.kv[slots])
        return out

    def logits_after(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What follows these tokens, [n_vocab]: any change of a token or of the order gives other logits."""
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
