"""Tensors of a file on their way to another type: one queue of small tasks over all of them, on all threads.

A task reads some rows, encodes them and writes them where they belong, so threads never wait for each other, nor for a
tensor's end, and no more than a task's rows are in memory for each of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from pyinfer.convert.encode import RowEncoder, row_encoder
from pyinfer.errors import ConvertError, ModelError
from pyinfer.quant.codec import FloatArray
from pyinfer.quant.tensor import QuantTensor
from pyinfer.quant.whole_file import write_at
from pyinfer.quant.writer import TensorHeader

_WEIGHTS_PER_TASK = 1 << 18
_TELL_SECONDS = 0.1


@dataclass(frozen=True)
class TensorJob(TensorHeader):
    """A tensor to be written, and the one it is made of."""

    source: QuantTensor
    columns: FloatArray | None = None  # importances (matrices, columns)


@dataclass(frozen=True)
class _Task:
    job: TensorJob
    rows: slice
    encode: RowEncoder | None  # None: the bytes stay as they are
    offset: int  # in the file


class _Queue:
    """Tasks for whoever asks, until one fails."""

    def __init__(self, tasks: Iterator[_Task]) -> None:
        self._tasks, self._lock = tasks, threading.Lock()
        self.n_bytes = 0  # written
        self.is_stopped = False
        self.error: BaseException | None = None

    def take(self, n_done: int) -> _Task | None:
        """The next task of somebody who has written so many more bytes."""
        with self._lock:
            self.n_bytes += n_done
            return None if self.is_stopped else next(self._tasks, None)

    def fail(self, error: BaseException) -> None:
        """Nobody gets a task any more; the first error is kept."""
        with self._lock:
            self.error, self.is_stopped = self.error or error, True


def write_tensors(
    file: BinaryIO,
    offsets: Mapping[str, int],
    jobs: Mapping[str, TensorJob],
    n_threads: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Write every tensor at its offset; `on_bytes` is told the bytes so far, in this thread.

    ConvertError names the tensor whose weights do not fit the type; OSError for a file that cannot be written.
    """
    queue = _Queue(_tasks(offsets, jobs))
    workers = [
        threading.Thread(target=_work, args=(queue, file), name=f"pyinfer-quantize-{i}") for i in range(n_threads)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            while worker.is_alive():
                worker.join(_TELL_SECONDS)
                on_bytes(queue.n_bytes)
    finally:  # also of an interrupt: tasks that run end, and no other begins
        queue.is_stopped = True
        for worker in workers:
            worker.join()
    if queue.error is not None:
        raise queue.error
    on_bytes(queue.n_bytes)


def _tasks(offsets: Mapping[str, int], jobs: Mapping[str, TensorJob]) -> Iterator[_Task]:
    for name, job in jobs.items():
        tensor = job.source
        n_rows, row_bytes = tensor.shape[-2] if len(tensor.shape) > 1 else 1, job.n_bytes // max(1, len(tensor.data))
        step = max(1, _WEIGHTS_PER_TASK // tensor.shape[-1])
        for matrix in range(math.prod(tensor.shape[:-2])):
            encode = None
            if job.codec != tensor.codec.name:
                weights = None if job.columns is None else job.columns[matrix]
                with _naming(tensor):
                    encode = row_encoder(tensor.codec, job.codec, tensor.shape[-1], weights)
            first, stop = matrix * n_rows, (matrix + 1) * n_rows
            for i in range(first, stop, step):
                yield _Task(job, slice(i, min(i + step, stop)), encode, offsets[name] + i * row_bytes)


def _work(queue: _Queue, file: BinaryIO) -> None:
    space, n_done = np.empty(0, np.uint8), 0
    try:
        while (task := queue.take(n_done)) is not None:
            tensor = task.job.source
            data = tensor.data[task.rows]
            out = data
            if task.encode is not None:
                row_bytes = task.encode.row_bytes
                if space.size < len(data) * row_bytes:
                    space = np.empty(len(data) * row_bytes, np.uint8)
                out = space[: len(data) * row_bytes].reshape(len(data), row_bytes)
                with _naming(tensor):
                    task.encode(data, out)
            write_at(file, out, task.offset)
            tensor.part(task.rows.start, task.rows.stop).release()
            n_done = out.nbytes
    except BaseException as error:
        queue.fail(error)


@contextmanager
def _naming(tensor: QuantTensor) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ConvertError(f"tensor {tensor.name}: {error}") from None
