"""What changes from step to step, in one piece of memory: filled on the host, uploaded by one copy, read by the kernels.

A program for `n_tokens` and `n_outputs` pads: a padding token has id -1 (a row of zeros), slot -1 (not stored) and sequence -1
(attention writes zeros); a padding output row is -1 (zeros); a padding sequence begins where the last one ends, so it is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import StageConfig
from pyinfer.graph.batch import Batch
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer

Int32 = npt.NDArray[np.int32]
_ALIGNMENT = 64  # elements


@dataclass(frozen=True, slots=True)
class StepFields:
    """Where a step's int32 arrays are, for one KV group and one bucket of tokens."""

    token_ids: Buffer  # [n_tokens]
    positions: Buffer  # [n_tokens]
    sequence_of_token: Buffer  # [n_tokens]
    output_rows: Buffer  # [n_outputs]
    sequence_starts: Buffer  # [max_sequences + 1]
    slots: Buffer  # [n_tokens], of the group
    page_tables: Buffer  # [max_sequences, table_stride], of the group
    table_stride: int


class StepBuffer:
    """The step's arrays on the host and on the device, at fixed places; page tables last."""

    def __init__(self, device: Device, config: StageConfig, n_groups: int) -> None:
        self._device = device
        self._n_sequences, self._stride = config.max_sequences, config.max_blocks
        tokens = config.max_tokens
        sizes = {
            "token_ids": tokens,
            "positions": tokens,
            "sequence_of_token": tokens,
            "output_rows": tokens,
            "sequence_starts": config.max_sequences + 1,
            "slots": n_groups * tokens,
            "page_tables": n_groups * config.max_sequences * self._stride,
        }
        self._offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._offsets[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._buffer = device.alloc(4 * end)
        self._host = device.alloc_pinned(4 * end).view(np.int32)
        self._arrays = {name: self._host[self._offsets[name] :][:size] for name, size in sizes.items()}
        self._arrays["slots"] = self._arrays["slots"].reshape(n_groups, tokens)
        self._tables = self._arrays["page_tables"].reshape(n_groups, config.max_sequences, self._stride)
        self._tables[:] = -1  # as no table has: every row is new at first
        self._uploaded: tuple[Int32, int, int] | None = None
        self._copied: Any = None  # the mark behind the last upload: nobody may have waited for its step

    def fields(self, group: int) -> StepFields:
        """Device addresses for kernels of a layer of this group."""

        def at(name: str, offset: int = 0) -> Buffer:
            start = self._offsets[name] + offset
            return self._buffer.at(4 * start, 4 * (self._arrays[name].size - offset))

        tokens = self._arrays["slots"].shape[1]
        return StepFields(
            token_ids=at("token_ids"),
            positions=at("positions"),
            sequence_of_token=at("sequence_of_token"),
            output_rows=at("output_rows"),
            sequence_starts=at("sequence_starts"),
            slots=at("slots", group * tokens),
            page_tables=at("page_tables", group * self._n_sequences * self._stride),
            table_stride=self._stride,
        )

    def upload(self, batch: Batch, n_tokens: int, n_outputs: int, *, once: bool = False) -> None:
        """Fill the arrays, padded to a program's rows, and copy what the step reads.

        `once`: not if it was this batch's already, for stages that run it one after another.
        """
        step = batch.token_ids, n_tokens, n_outputs
        if once and self._uploaded is not None and step[0] is self._uploaded[0] and step[1:] == self._uploaded[1:]:
            return
        self._uploaded = step
        if self._copied is not None:
            self._device.wait(self._copied)
        arrays, n, n_sequences = self._arrays, batch.n_tokens, batch.n_sequences
        assert n <= n_tokens <= len(arrays["token_ids"]) and n_sequences <= self._n_sequences
        _fill(arrays["token_ids"], batch.token_ids, n_tokens, -1)
        _fill(arrays["positions"], batch.positions, n_tokens, 0)
        counts = np.diff(batch.sequence_starts)
        _fill(arrays["sequence_of_token"], np.repeat(np.arange(n_sequences, dtype=np.int32), counts), n_tokens, -1)
        _fill(arrays["output_rows"], batch.output_rows, n_outputs, -1)
        _fill(arrays["sequence_starts"], batch.sequence_starts, self._n_sequences + 1, n)
        arrays["slots"][:, :n] = batch.slots
        arrays["slots"][:, n:n_tokens] = -1
        self._device.upload(self._buffer, self._host[: self._offsets["page_tables"]])
        self._upload_tables(batch.page_tables)
        self._copied = self._device.record(self._copied)

    def _upload_tables(self, tables: Int32) -> None:
        """Copy the rows that changed since the last step: most sequences write into the page they had."""
        _, n_sequences, width = tables.shape
        held = self._tables[:, :n_sequences, :width]
        changed = (held != tables).any(axis=2)
        if not changed.any():
            return
        held[:] = tables
        for group, rows in enumerate(changed):
            edges = np.flatnonzero(np.diff(rows.astype(np.int8), prepend=0, append=0))
            for first, end in edges.reshape(-1, 2).tolist():
                row = self._tables[group, first:end].reshape(-1)[: (end - first - 1) * self._stride + width]
                offset = self._offsets["page_tables"] + (group * self._n_sequences + first) * self._stride
                self._device.upload(self._buffer, row, 4 * offset)


def _fill(target: Int32, values: Int32, size: int, padding: int) -> None:
    target[: len(values)] = values
    target[len(values) : size] = padding
