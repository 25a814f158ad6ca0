"""Sampling on the device (`sample.cu`): a step's rows are packed on the host, uploaded in one copy, and drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.graph.sampling import EDIT, NOT_FINITE, RowLogprobs, RowSampling, Sampled
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch

_SOURCE, _STEPS = "sample.cu", "sample_steps.cu"
_THREADS = 1024
_NUMBER_THREADS = 128
_ROW = np.dtype(
    [
        ("row", "<i4"), ("top_k", "<i4"), ("first_edit", "<i4"), ("n_edits", "<i4"),
        ("temperature", "<f8"), ("top_p", "<f8"), ("min_p", "<f8"),
    ]
)  # fmt: skip
_COUNTER = np.dtype([("seed", "<i8"), ("index", "<i8"), ("position", "<i8")])
_LOGPROB = np.dtype([("logit", "<f4"), ("largest", "<f4"), ("sum", "<f8"), ("rank", "<i4"), ("padding", "<i4")])
MAX_EDITS = 1 << 16  # of all rows of a step
MAX_LOGPROBS = 256  # for one row; the kernel's list takes 1024
MAX_VOCAB = 1 << 22  # 2048 chunks of 2048 ids


class _Started:
    """A step whose tokens are on their way into pinned memory."""

    def __init__(self, device: Device, max_rows: int) -> None:
        self.tokens = device.alloc_pinned(4 * max_rows).view(np.int32)
        self.rows: list[RowSampling] = []
        self.mark: Any = None
        self._entries = device.alloc_pinned(max_rows * _LOGPROB.itemsize).view(_LOGPROB)
        self._top_ids, self._top_logits = (device.alloc_pinned(4 * max_rows * MAX_LOGPROBS) for _ in range(2))

    @property
    def n_top(self) -> int:
        """Most likely tokens that are wanted of a row; -1: no row wants logprobs."""
        return max((row.n_logprobs for row in self.rows if row.n_logprobs is not None), default=-1)

    @property
    def logprobs(self) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """An entry a row, and ids and logits of the most likely tokens [n, n_top]."""
        n, n_top = len(self.rows), self.n_top
        shape, n_bytes = (n, n_top), 4 * n * n_top
        ids, logits = self._top_ids[:n_bytes].view(np.int32), self._top_logits[:n_bytes].view(np.float32)
        return self._entries[:n], ids.reshape(shape), logits.reshape(shape)


class DeviceSampler:
    """Buffers for `max_rows` rows of `n_vocab` logits and `max_steps` steps at once."""

    def __init__(self, device: Device, n_vocab: int, max_rows: int, max_steps: int = 1) -> None:
        assert n_vocab <= MAX_VOCAB
        self._device, self._n_vocab, self._max_rows, self.max_steps = device, n_vocab, max_rows, max_steps
        self._mask_words = -(-n_vocab // 32)
        # rows, numbers, counters and edits one after another: what a step needs of them goes in one copy
        sizes = (_ROW.itemsize, 8, _COUNTER.itemsize)
        self._starts = np.cumsum([0, *(size * max_rows for size in sizes)]).tolist()
        n_bytes = self._starts[-1] + MAX_EDITS * EDIT.itemsize
        self._host = device.alloc_pinned(n_bytes)
        self._packed = device.alloc(n_bytes)
        self._originals = device.alloc(4 * MAX_EDITS)
        self._numbers = device.alloc(8 * max_rows * max_steps)  # of `run_steps`
        self.tokens = device.alloc(4 * max_rows * max_steps)
        self._tokens_host = device.alloc_pinned(4 * max_rows * max_steps).view(np.int32)
        self._started = [_Started(device, max_rows) for _ in range(2)]
        self._ticket = 0
        self._copied: Any = None  # the mark behind the last upload
        self._mask: Buffer | None = None
        most = 4 * max_rows * MAX_LOGPROBS
        self._logprobs = device.alloc(max_rows * _LOGPROB.itemsize), device.alloc(most), device.alloc(most)

    def kernels(self) -> list[Kernel]:
        return [Kernel(_SOURCE, "sample_rows"), Kernel(_SOURCE, "row_logprobs"), Kernel(_STEPS, "draw_numbers")]

    def upload(self, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None = None) -> None:
        """Pack and copy what `sample` and `draw_all` read."""
        n = len(rows)
        assert 0 < n <= self._max_rows
        if self._copied is not None:
            self._device.wait(self._copied)
        starts = self._starts
        packed = self._host[: starts[1]].view(_ROW)[:n]
        counts = [0 if row.edits is None else len(row.edits) for row in rows]
        first = np.cumsum([0, *counts])
        packed[:] = [
            (row.row, row.top_k, start, count, row.temperature, row.top_p, row.min_p)
            for row, start, count in zip(rows, first.tolist(), counts, strict=False)
        ]
        self._host[starts[1] : starts[2]].view(np.float64)[:n] = [row.number for row in rows]
        self._host[starts[2] : starts[3]].view(_COUNTER)[:n] = [row.counter for row in rows]
        n_edits = int(first[-1])
        assert n_edits <= MAX_EDITS
        if n_edits:
            edits = self._host[starts[3] :].view(EDIT)
            np.concatenate([row.edits for row in rows if row.edits is not None], out=edits[:n_edits])
        self._device.upload(self._packed, self._host[: starts[3] + n_edits * EDIT.itemsize])
        self._copied = self._device.record(self._copied)
        if mask is not None:
            if self._mask is None:
                self._mask = self._device.alloc(4 * self._max_rows * self._mask_words)
            assert mask.shape == (n, self._mask_words) and mask.dtype == np.uint32
            self._device.upload(self._mask, np.ascontiguousarray(mask))

    def draw_all(self, n: int, n_steps: int) -> Launch:
        """The numbers of n rows for all steps, from their counters."""
        assert n_steps <= self.max_steps
        counters = self._packed.at(self._starts[2])
        blocks = -(-n * n_steps // _NUMBER_THREADS)
        return Launch(
            Kernel(_STEPS, "draw_numbers"),
            (blocks, 1, 1),
            (_NUMBER_THREADS, 1, 1),
            (counters, n, n_steps, self._numbers),
        )

    def sample(self, logits: Buffer, stride: int, n: int, *, has_mask: bool = False, step: int | None = None) -> Launch:
        """Tokens of the uploaded rows of `logits`, float32 [., stride]. With `step` the numbers are those of `draw_all`."""
        numbers = self._packed.at(self._starts[1]) if step is None else self._numbers.at(8 * n * step)
        tokens = self.tokens.at(4 * n * (step or 0))
        mask = self._mask if has_mask else None
        edits = self._packed.at(self._starts[3])
        return Launch(
            Kernel(_SOURCE, "sample_rows"),
            (n, 1, 1),
            (_THREADS, 1, 1),
            (
                logits,
                self._n_vocab,
                stride,
                self._packed,
                edits,
                self._originals,
                mask,
                self._mask_words,
                numbers,
                tokens,
            ),
        )

    def start(
        self, logits: Buffer, stride: int, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None = None
    ) -> int:
        """Upload and sample without waiting; a ticket for `fetch`. The one before the last must have been fetched, or is lost."""
        self._ticket ^= 1
        started = self._started[self._ticket]
        started.rows = list(rows)
        if rows:
            self.upload(rows, mask)
            self._device.launch(self.sample(logits, stride, len(rows), has_mask=mask is not None))
            self._device.download(self.tokens, started.tokens[: len(rows)])
            if started.n_top >= 0:
                self._start_logprobs(logits, stride, started)
        started.mark = self._device.record(started.mark)
        return self._ticket

    def _start_logprobs(self, logits: Buffer, stride: int, started: _Started) -> None:
        n, n_top = len(started.rows), started.n_top
        assert n_top <= MAX_LOGPROBS
        entries, top_ids, top_logits = self._logprobs
        args = (logits, self._n_vocab, stride, self._packed, self.tokens, n_top, entries, top_ids, top_logits)
        self._device.launch(Launch(Kernel(_SOURCE, "row_logprobs"), (n, 1, 1), (_THREADS, 1, 1), args))
        for buffer, array in zip(self._logprobs, started.logprobs, strict=True):
            if array.size:
                self._device.download(buffer, array)

    def fetch(self, ticket: int) -> Sampled:
        """Wait for what was started."""
        started = self._started[ticket]
        self._device.wait(started.mark)
        tokens: list[int] = started.tokens[: len(started.rows)].tolist()
        if started.n_top < 0:
            return Sampled(tokens, [None] * len(tokens))
        found = started.logprobs
        # a token that was not drawn has none: its entry is an older one's
        return Sampled(
            tokens,
            [
                None if token == NOT_FINITE else _logprobs(row.n_logprobs, i, *found)
                for i, (row, token) in enumerate(zip(started.rows, tokens, strict=True))
            ],
        )

    def fetch_tokens(self, n: int) -> list[int]:
        """The first n tokens; waits for them."""
        self._device.download(self.tokens, self._tokens_host[:n])
        self._device.synchronize()
        tokens: list[int] = self._tokens_host[:n].tolist()
        return tokens


def _logprobs(
    wanted: int | None,
    i: int,
    entries: npt.NDArray[np.void],
    top_ids: npt.NDArray[np.int32],
    top_logits: npt.NDArray[np.float32],
) -> RowLogprobs | None:
    if wanted is None:
        return None
    entry = entries[i]
    log_sum = float(entry["largest"]) + math.log(float(entry["sum"])) if entry["sum"] else math.nan
    return RowLogprobs(
        logit=float(entry["logit"]),
        rank=int(entry["rank"]),
        log_sum=log_sum,
        top_ids=top_ids[i, :wanted].tolist(),
        top_logits=top_logits[i, :wanted].tolist(),
    )
