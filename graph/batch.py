"""`Batch`: what one step runs over. The boundary between the scheduler's world and a stage's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Rows = npt.NDArray[Any]  # float32 or int32 [rows, width]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tokens of one or more sequences, each sequence's tokens contiguous and at consecutive positions."""

    token_ids: Int32  # [n]
    positions: Int32  # [n] absolute position in the token's sequence
    slots: Int32  # [n_groups, n] where the token's K and V go in each KV group's layers: page * block_size + offset
    sequence_starts: Int32  # [n_sequences + 1] offsets into the token axis
    # [n_groups, n_sequences, max_pages] page of each block of positions; what is past a sequence's end is 0, what is
    # behind a group's window is some page of others, not to be read
    page_tables: Int32
    output_rows: Int32  # [n_outputs] ascending token indices whose logits are wanted
    hidden: tuple[Rows, ...] = ()  # one for each op `Hidden`, in order: [n or n_outputs, width] of stages before

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def n_sequences(self) -> int:
        return len(self.sequence_starts) - 1

    def check(self, *, n_vocab: int, n_pages: int, block_size: int, n_groups: int = 1) -> None:
        """Assert that every index is in range and that slots, positions and page tables tell the same story."""
        n = self.n_tokens
        assert n > 0 and len(self.positions) == n and self.slots.shape == (n_groups, n)
        assert self.page_tables.shape[:2] == (n_groups, self.n_sequences)
        assert self.token_ids.min() >= 0 and self.token_ids.max() < n_vocab
        assert (self.page_tables >= 0).all() and (self.page_tables < n_pages).all()
        assert self.sequence_starts[0] == 0 and self.sequence_starts[-1] == n
        lengths = np.diff(self.sequence_starts)
        assert lengths.min() > 0, "a sequence without tokens"
        goes_on = np.diff(self.positions) == 1
        goes_on[self.sequence_starts[1:-1] - 1] = True
        assert self.positions.min() >= 0 and goes_on.all()
        block, offset = np.divmod(self.positions, block_size)
        pages = self.page_tables[:, np.repeat(np.arange(self.n_sequences), lengths), block]
        assert (self.slots == pages * block_size + offset).all()
        assert np.unique(self.slots).size == self.slots.size, "two tokens or groups write to one slot"
        if len(self.output_rows):
            assert (np.diff(self.output_rows) > 0).all()
            assert self.output_rows[0] >= 0 and self.output_rows[-1] < n
