"""`GPUStage`: a lowered graph on one device, a program for each bucket of rows, each captured once as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyinfer.errors import ConfigError
from pyinfer.graph.backend import PageData, Progress, Stage, StageConfig
from pyinfer.graph.batch import Batch, Rows
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Value
from pyinfer.graph.sampling import PREVIOUS, Int32, RowSampling, Sampled
from pyinfer.kernels_gpu.attention import FEW_TOKENS, StepKind
from pyinfer.kernels_gpu.batch_parts import split_batch
from pyinfer.kernels_gpu.bounds import BOUNDED_ROWS, lengths_of_gates
from pyinfer.kernels_gpu.buckets import bucket_of, output_buckets, sequence_buckets, token_buckets
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.expand import make_copies
from pyinfer.kernels_gpu.launch import Buffer, Kernel, Launch
from pyinfer.kernels_gpu.lower import lower
from pyinfer.kernels_gpu.matvec_tuned import TunedCuts
from pyinfer.kernels_gpu.program import Program, ProgramShape
from pyinfer.kernels_gpu.route_measure import RouteCache, measure_routes
from pyinfer.kernels_gpu.sample import MAX_EDITS, MAX_LOGPROBS
from pyinfer.kernels_gpu.share import DeviceShare
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.kernels_gpu.stage_sampling import MAX_STEPS, StageSampling
from pyinfer.kernels_gpu.weight_stream import PartStream

F32Array = npt.NDArray[np.float32]
_MAX_OUTPUTS = 256  # rows that go through the head in one program; its logits take much memory
_MAX_TOKENS = 65535  # of a step: rows are counted in the second and third direction of grids
_WORTH_PINNING = 1 << 20  # bytes
_MAX_PROGRAMS = 128  # captured ones that are kept; the one unused for longest goes first


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    program: Program
    executable: Any


def _kernels_of(programs: Sequence[Program]) -> list[Kernel]:
    return list(
        dict.fromkeys(step.kernel for program in programs for step in program.steps if isinstance(step, Launch))
    )


class GPUStage:
    """See `graph.backend.Stage` and `graph.sampling.SamplingStage`."""

    max_edits, max_logprobs = MAX_EDITS, MAX_LOGPROBS

    def __init__(
        self,
        device: Device,
        graph: Graph,
        config: StageConfig,
        progress: Progress | None = None,
        *,
        measure: bool = False,
        share: DeviceShare | None = None,
        number: int = 0,
        last_reader: int = 0,
        stream: PartStream | None = None,
        kept: Sequence[Value] = (),
        is_again: bool = False,
    ) -> None:
        """With `measure` large products are timed once on this kind of GPU (`route_measure`).

        With a `share` the device has other stages of the model as well, and the share has loaded the weights; `number` is
        this one's among them, in the order in which they run, and `last_reader` that of the last that reads its results.
        The results `kept` do not come to the host, as only those stages read them. A `stream` brings the matrices in every
        step, of a part without pages and outputs. `is_again`: another stage has this graph, and has prepared what it takes.
        """
        graph.check()
        if config.max_tokens > _MAX_TOKENS:
            raise ConfigError(
                f"max_num_batched_tokens is {config.max_tokens}; a step on a GPU has at most {_MAX_TOKENS} tokens",
                param="max_num_batched_tokens",
            )
        self._device, self._graph, self._config = device, graph, config
        self._max_outputs = max(_MAX_OUTPUTS, config.max_sequences)
        self._programs: dict[ProgramShape, _Captured] = {}
        self._is_alone, self._has_pages = share is None, number == 0  # for all stages that share them
        self._stream = stream
        self._is_fed = False  # rows of the stage before are there, or on their way, for the next step
        try:
            self._memory = StageMemory(device, graph, config, share, stream)
            if self._is_alone:
                self._memory.share.weights.load(progress)
            is_new = stream is None and not is_again
            if config.gpu_expand and is_new:
                self._memory.copies.update(make_copies(device, graph, self._memory.share.weights))
            if config.max_tokens >= BOUNDED_ROWS and is_new:
                weights = self._memory.share.weights
                self._memory.lengths.update(lengths_of_gates(device, self._memory.groups, weights))
            if measure:
                TunedCuts(device.name).use(device.arch)
            if measure and is_new:
                measure_routes(self._memory, token_buckets(config.max_tokens), RouteCache(device.name))
            shapes = [] if is_again else self._usual_shapes()
            usual = [lower(self._memory, shape) for shape in shapes]  # makes room in the workspace
            self._kernels = _kernels_of(usual)
            self._kept = self._memory.share.keep(kept, number, last_reader)
            sizes = [
                0 if id(value) in self._kept else 4 * self._max_results(value) * value.width for value in graph.results
            ]
            self._results = self._memory.share.pinned_results(number, last_reader, sizes)
            self._sampling = StageSampling(self._memory, self._max_outputs) if self.can_sample else None
        except BaseException:
            if self._is_alone:
                device.close()
            raise
        self._memory.share.n_users += 1

    def run(self, batch: Batch) -> F32Array:
        """Logits float32 [n_outputs, n_vocab], or a part's first result, until the next call."""
        return self.run_part(batch)[0]

    def run_part(self, batch: Batch) -> tuple[Rows, ...]:
        """See `graph.backend.PartStage`."""
        if self._stream is not None or len(batch.output_rows) <= self._max_outputs:
            return self._run(batch)
        parts = [[rows.copy() for rows in self._run(part)] for part in split_batch(batch, self._max_outputs)]
        return tuple(np.concatenate(rows) for rows in zip(*parts, strict=True))

    def pin(self, memory: Sequence[npt.NDArray[np.uint8]]) -> None:
        """See `graph.backend.PinningStage`. Small pieces are not worth it."""
        self._device.pin([each for each in memory if each.nbytes >= _WORTH_PINNING])

    def can_feed(self, follower: Stage, batch: Batch) -> bool:
        """See `graph.backend.FeedingStage`: from GPU to GPU, where one reads the other's memory."""
        return (
            isinstance(follower, GPUStage)
            and len(batch.output_rows) <= min(self._max_outputs, follower._max_outputs)
            and list(map(id, follower._memory.hidden_values)) == list(map(id, self._graph.results))
            and follower._device.can_receive(self._device)
        )

    def run_into(self, batch: Batch, follower: Stage) -> None:
        """See `graph.backend.FeedingStage`. The host does not wait: the follower's device does."""
        assert isinstance(follower, GPUStage)
        buffers = self._start(batch).results
        for value, buffer in zip(self._graph.results, buffers, strict=True):
            n_bytes = 4 * value.width * self.n_results(batch, value)
            if n_bytes:
                target = follower._memory.hidden[id(value)]
                follower._device.receive(self._device, target, buffer, n_bytes)
        follower._is_fed = True

    def _run(self, batch: Batch) -> tuple[Rows, ...]:
        buffers, rows, padded = self._start(batch).results, list[Rows](), self._shape(batch).n_tokens
        for value, buffer, pinned in zip(self._graph.results, buffers, self._results, strict=True):
            n = self.n_results(batch, value)
            if id(value) in self._kept:
                n_bytes = 4 * padded * value.width  # what padding has chosen goes with it: no experts
                self._device.copy(self._kept[id(value)], buffer.at(0, n_bytes), n_bytes)
                rows.append(np.empty((0, value.width), np.float32))
                continue
            host = pinned.view(np.int32 if value.dtype == "i32" else np.float32)[: n * value.width]
            if n:
                self._device.download(buffer, host)
            rows.append(host.reshape(n, value.width))
        if any(len(each) for each in rows):
            self._device.synchronize()
        return tuple(rows)

    @property
    def can_sample(self) -> bool:
        """See `graph.sampling.SamplingStage`: with the head the tokens are drawn here."""
        return self._graph.is_head

    @property
    def max_steps(self) -> int:
        """Without the embedding each step's tokens have to come back."""
        return 1 if self._memory.hidden_values else MAX_STEPS

    def run_sampled(self, batch: Batch, rows: Sequence[RowSampling], mask: npt.NDArray[np.uint32] | None) -> Sampled:
        assert self._sampling is not None
        return self._sampling.draw(self.forward(batch), rows, mask)

    @property
    def can_overlap(self) -> bool:
        """See `graph.sampling.OverlappingStage`: of a whole model."""
        return self.max_steps > 1 and self._is_alone and self.can_sample

    def start_sampled(self, batch: Batch, rows: Sequence[RowSampling]) -> int:
        assert self._sampling is not None
        return self._sampling.start(self.forward(batch), rows)

    def fetch_sampled(self, ticket: int) -> Sampled:
        assert self._sampling is not None
        return self._sampling.fetch(ticket)

    def run_steps(self, batch: Batch, rows: Sequence[RowSampling], n_steps: int) -> Int32:
        assert self._sampling is not None and 0 < n_steps <= self.max_steps
        logits = self.forward(batch)
        return self._sampling.steps(self._programs[self._shape(batch)].executable, logits, rows, n_steps)

    @staticmethod
    def n_results(batch: Batch, value: Value) -> int:
        """Rows of a result that a step of this batch gives."""
        return batch.n_tokens if value.rows == "tokens" else len(batch.output_rows)

    def forward(self, batch: Batch) -> Buffer:
        """Start a step; its logits will be in this buffer of the device, float32, padded. At most 256 or as many outputs
        as there may be sequences."""
        return self._start(batch).result

    def _start(self, batch: Batch) -> Program:
        shape = self._shape(batch)
        captured = self._programs.pop(shape) if shape in self._programs else self._capture(shape)
        self._programs[shape] = captured  # as the latest
        n_outputs = bucket_of(len(batch.output_rows), output_buckets(shape.n_tokens))  # for parts without them, too
        self._memory.step.upload(batch, shape.n_tokens, n_outputs, once=not self._is_alone)
        is_fed, self._is_fed = self._is_fed, False
        for value, rows in zip(self._memory.hidden_values, batch.hidden, strict=not is_fed):
            if len(rows):
                self._device.upload(self._memory.hidden[id(value)], np.ascontiguousarray(rows))
        if self._stream is not None:
            self._stream.bring()
        if self._sampling is not None and batch.token_ids.min() <= PREVIOUS:
            self._device.launch(self._sampling.name_tokens(batch.n_tokens))
        self._device.run(captured.executable)
        return captured.program

    def _shape(self, batch: Batch) -> ProgramShape:
        """The program that this batch runs."""
        counts = np.diff(batch.sequence_starts)
        n, n_outputs = batch.n_tokens, len(batch.output_rows)
        assert 0 < n <= self._config.max_tokens and len(counts) <= self._config.max_sequences
        n_tokens = bucket_of(n, token_buckets(self._config.max_tokens))
        if self._stream is not None:
            return ProgramShape("prompt", n_tokens, 0, 1)
        outputs = bucket_of(n_outputs, output_buckets(n_tokens))
        if len(counts) == n:
            return ProgramShape("decode", n_tokens, outputs, n_tokens, all_rows=n_outputs == n)
        sequences = bucket_of(len(counts), sequence_buckets(self._config.max_sequences))
        kind: StepKind = "prompt" if counts.min() > FEW_TOKENS else "mixed"
        return ProgramShape(kind, n_tokens, outputs, sequences)

    def prepare(self) -> None:
        """Compile what decoding and prompts take, so that no step has to wait for it."""
        self._device.prepare(self.kernels())

    def kernels(self) -> list[Kernel]:
        """What decoding and prompts take."""
        return [*self._kernels, *(self._sampling.kernels() if self._sampling else ())]

    def _usual_shapes(self) -> list[ProgramShape]:
        """Of steps that only decode, of one prompt, and of both; the largest first."""
        config = self._config
        rows = [n for n in token_buckets(config.max_tokens) if n > FEW_TOKENS][::-1]
        if self._stream is not None:
            return [ProgramShape("prompt", n, 0, 1) for n in rows]
        decode = token_buckets(min(config.max_tokens, config.max_sequences))
        outputs = [bucket_of(min(n, self._max_outputs), output_buckets(n)) for n in rows]
        shapes = [ProgramShape("mixed", n, m, config.max_sequences) for n, m in zip(rows, outputs, strict=True)]
        shapes += [ProgramShape("prompt", n, 1, 1) for n in rows]
        return [*shapes, *(ProgramShape("decode", n, n, n, all_rows=True) for n in decode)]

    def _max_results(self, value: Value) -> int:
        n = self._config.max_tokens
        return n if value.rows == "tokens" else bucket_of(min(n, self._max_outputs), output_buckets(n))

    def _capture(self, shape: ProgramShape) -> _Captured:
        program = lower(self._memory, shape)
        while len(self._programs) >= _MAX_PROGRAMS:
            self._programs.pop(next(iter(self._programs)))
        return _Captured(program, self._device.capture(program.steps))

    def copy_page(self, source: int, target: int) -> None:
        if self._has_pages:
            self._memory.pages.copy(source, target)

    def read_pages(self, pages: Sequence[int]) -> PageData:
        return self._memory.pages.read(pages) if self._has_pages else np.empty((len(pages), 0), np.uint8)

    def write_pages(self, pages: Sequence[int], data: PageData) -> None:
        if self._has_pages:
            self._memory.pages.write(pages, data)

    def close(self) -> None:
        """Give the device's memory back, once no stage is left there."""
        self._programs.clear()
        self._memory.share.leave()
