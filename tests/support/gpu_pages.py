"""Steps over pages for tests of GPU kernels: sequences on random pages, pools with NaN wherever no key or value is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cuda_emulator.device import EmulatedDevice

from pyinfer.graph.reference import kept_as
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.pages import KVPool, LayerPages
from pyinfer.kernels_gpu.step_buffer import StepFields

F32Array = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence in a step: `count` of them from position `start` on."""

    start: int
    count: int = 1

    @property
    def end(self) -> int:
        return self.start + self.count


class PagedStep:
    """Tokens of several sequences, padded to `n_tokens`, with block tables of random pages."""

    def __init__(
        self,
        spans: Sequence[Span],
        block_size: int,
        rng: np.random.Generator,
        n_tokens: int = 0,
        max_sequences: int = 0,
    ) -> None:
        self.spans, self.block_size = list(spans), block_size
        self.n_real = sum(span.count for span in spans)
        self.n_tokens = max(n_tokens, self.n_real)
        self.max_sequences = max(max_sequences, len(spans))
        blocks = [-(-span.end // block_size) for span in spans]
        self.n_pages = sum(blocks) + 3
        order = iter(rng.permutation(self.n_pages))
        self.stride = max(blocks) + 2
        self.tables = np.full((self.max_sequences, self.stride), -1, np.int32)
        for row, n in zip(self.tables, blocks, strict=False):
            row[:n] = [next(order) for _ in range(n)]
        padding = self.n_tokens - self.n_real
        self.positions = np.concatenate([*(np.arange(s.start, s.end) for s in spans), np.zeros(padding)]).astype(
            np.int32
        )
        counts = [span.count for span in spans]
        self.sequence_of_token = np.repeat([*range(len(spans)), -1], [*counts, padding]).astype(np.int32)
        starts = np.cumsum([0, *counts])
        self.sequence_starts = np.pad(starts, (0, self.max_sequences - len(spans)), mode="edge").astype(np.int32)
        page, offset = np.divmod(self.positions, block_size)
        slots = self.tables[self.sequence_of_token, page] * block_size + offset
        self.slots = np.where(self.sequence_of_token < 0, -1, slots).astype(np.int32)

    def fields(self, device: EmulatedDevice) -> StepFields:
        unused = device.array(np.zeros(1, np.int32))
        return StepFields(
            token_ids=unused,
            positions=device.array(self.positions),
            sequence_of_token=device.array(self.sequence_of_token),
            output_rows=unused,
            sequence_starts=device.array(self.sequence_starts),
            slots=device.array(self.slots),
            page_tables=device.array(self.tables),
            table_stride=self.stride,
        )

    def slots_of(self, sequence: int, first: int, end: int) -> Int32:
        """Slots of positions first..end - 1 of a sequence."""
        page, offset = np.divmod(np.arange(first, end), self.block_size)
        slots: Int32 = self.tables[sequence, page] * self.block_size + offset
        return slots


class Pool:
    """Keys or values of one layer in one type, on the host until `upload`; slots that nobody writes are NaN or -128."""

    def __init__(self, step: PagedStep, kind: str, n_kv_heads: int, head_dim: int) -> None:
        self.kind, self._shape = kind, (step.n_pages, n_kv_heads, step.block_size, head_dim)
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.int8}[kind]
        self.codes = np.full(self._shape, {"bf16": 0x7FC0, "q8_0": -128}.get(kind, np.nan), dtype)
        self.scales = np.full((*self._shape[:3], head_dim // 32), np.nan, np.float16)

    def write(self, slots: Int32, x: F32Array) -> None:
        """x: [n, n_kv_heads, head_dim]."""
        page, offset = np.divmod(slots, self._shape[2])
        if self.kind == "q8_0":
            blocks = x.reshape(*x.shape[:2], -1, 32)
            amax = np.abs(blocks).max(axis=3)
            inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 1e-30)
            self.codes[page, :, offset] = np.rint(blocks * inverse[..., None]).reshape(x.shape).astype(np.int8)
            self.scales[page, :, offset] = (amax / np.float32(127)).astype(np.float16)
        elif self.kind == "bf16":
            flat = kept_as("bf16", x.reshape(len(x), -1)).reshape(x.shape)
            self.codes[page, :, offset] = (np.ascontiguousarray(flat).view(np.uint32) >> 16).astype(np.uint16)
        else:
            self.codes[page, :, offset] = x.astype(self.codes.dtype)

    def read(self, slots: Int32) -> F32Array:
        """float32 [n, n_kv_heads, head_dim]."""
        page, offset = np.divmod(slots, self._shape[2])
        codes = self.codes[page, :, offset]
        if self.kind == "q8_0":
            blocks = codes.astype(np.float32).reshape(*codes.shape[:2], -1, 32)
            scales = self.scales[page, :, offset].astype(np.float32)
            return (blocks * scales[..., None]).reshape(codes.shape)
        if self.kind == "bf16":
            return (codes.astype(np.uint32) << 16).view(np.float32)
        return codes.astype(np.float32)

    def upload(self, device: EmulatedDevice) -> KVPool:
        scales: Buffer | None = device.array(self.scales) if self.kind == "q8_0" else None
        n_pages = self._shape[0]
        return KVPool(device.array(self.codes), scales, self.codes.nbytes // n_pages, self.scales.nbytes // n_pages)

    def download(self, device: EmulatedDevice, pool: KVPool) -> None:
        device.download(pool.codes, self.codes)
        if pool.scales is not None:
            device.download(pool.scales, self.scales)


def layer_pages(device: EmulatedDevice, keys: Pool, values: Pool) -> LayerPages:
    return LayerPages(keys.upload(device), values.upload(device), keys.kind, values.kind)
