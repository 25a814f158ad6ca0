"""`StageSampling`: what a stage with the head does after the logits: draw on the device, and decode several steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.graph.batch import Int32
from pyinfer.graph.sampling import RowSampling, Sampled
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.sample import DeviceSampler
from pyinfer.kernels_gpu.stage_memory import StageMemory

MAX_STEPS = 32
_STEPS, _THREADS = "sample_steps.cu", 128


class StageSampling:
    """Belongs to one stage; `max_rows` rows of logits at most."""

    def __init__(self, memory: StageMemory, max_rows: int) -> None:
        self._memory, self._device = memory, memory.device
        self._width = memory.graph.logits.width
        self._sampler = DeviceSampler(memory.device, self._width, max_rows, MAX_STEPS)

    def kernels(self) -> list[Kernel]:
        return [*self._sampler.kernels(), *(Kernel(_STEPS, name) for name in ("advance_step", "name_tokens"))]

    def draw(self, logits: Buffer, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None) -> Sampled:
        """Tokens of a step whose logits are on their way."""
        return self.fetch(self.start(logits, rows, mask))

    def start(self, logits: Buffer, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None = None) -> int:
        """Draw behind a step that was started, without waiting; a ticket for `fetch`."""
        return self._sampler.start(logits, self._width, rows, mask)

    def fetch(self, ticket: int) -> Sampled:
        return self._sampler.fetch(ticket)

    def name_tokens(self, n: int) -> Launch:
        """Of the step's n ids those that stand for tokens of the step before become these."""
        blocks = (-(-n // _THREADS), 1, 1)
        ids = self._memory.fields[0].token_ids
        return Launch(Kernel(_STEPS, "name_tokens"), blocks, (_THREADS, 1, 1), (self._sampler.tokens, n, ids))

    def steps(self, executable: Any, logits: Buffer, rows: Sequence[RowSampling], n_steps: int) -> Int32:
        """Tokens int32 [n_steps, n]: of the step that was started, and of `executable` run again for each further one."""
        n, device, sampler = len(rows), self._device, self._sampler
        sampler.upload(rows)
        device.launch(sampler.draw_all(n, n_steps))
        for step in range(n_steps):
            if step:
                device.launch(self._advance(n, step))
                device.run(executable)
            device.launch(sampler.sample(logits, self._width, n, step=step))
        return np.array(sampler.fetch_tokens(n * n_steps), np.int32).reshape(n_steps, n)

    def _advance(self, n: int, step: int) -> Launch:
        """The tokens of the step before become the input of this one."""
        fields, config = self._memory.fields[0], self._memory.config
        table_size = config.max_sequences * fields.table_stride
        return Launch(
            Kernel(_STEPS, "advance_step"),
            (-(-n // _THREADS), 1, 1),
            (_THREADS, 1, 1),
            (
                self._sampler.tokens.at(4 * n * (step - 1)), n, fields.token_ids, fields.positions, fields.slots,
                fields.page_tables, len(self._memory.fields), config.max_tokens, table_size, fields.table_stride,
                config.block_size,
            ),
        )  # fmt: skip
