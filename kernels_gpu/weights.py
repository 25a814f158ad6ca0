"""A graph's matrices and vectors in device memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.backend import Progress
from pyinfer.graph.graph import Graph
from pyinfer.graph.split import weights_of
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.repack import build_repack, can_repack
from pyinfer.kernels_gpu.weights_layout import WeightLayout, layout_of, pack
from pyinfer.quant.tensor import QuantTensor

_STAGING_BYTES = 8 << 20  # of a file's rows on the device, before they are repacked there


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A matrix in the layout of `weights_layout`."""

    layout: WeightLayout
    buffer: Buffer

    def part(self, name: str) -> Buffer | None:
        """The part of this name; None if the type has none."""
        for part in self.layout.parts:
            if part.name == name:
                return self.buffer.at(part.offset, part.row_bytes * self.layout.n_rows)
        return None


class DeviceWeights:
    """Every matrix of some graphs, each once: a tied output matrix is the embedding's table."""

    def __init__(self, device: Device, *graphs: Graph) -> None:
        self._device = device
        self._tensors = list({id(t.data): t for graph in graphs for t in weights_of(graph)}.values())
        self._weights = {
            id(tensor.data): DeviceWeight(layout, device.alloc(layout.n_bytes))
            for tensor in self._tensors
            for layout in (layout_of(tensor.codec.name, tensor.data.shape[0], tensor.shape[-1]),)
        }
        self._vectors: dict[int, tuple[npt.NDArray[np.float32], Buffer]] = {}

    def load(self, progress: Progress | None = None) -> None:
        """Copy every matrix and pack it on the device; the file's pages are let go of behind it."""
        total, done = sum(tensor.n_bytes for tensor in self._tensors), 0
        row_bytes = max((tensor.data.shape[-1] for tensor in self._tensors), default=0)
        staging = self._device.alloc(max(_STAGING_BYTES, row_bytes))
        for tensor in self._tensors:
            if progress is not None:
                progress("loading weights", done / total)
            weight = self._weights[id(tensor.data)]
            if can_repack(weight.layout):
                self._repack(tensor, weight, staging)
            else:
                for offset, data in pack(tensor):
                    self._device.upload(weight.buffer, np.ascontiguousarray(data), offset)
            tensor.release()
            done += tensor.n_bytes
        self._device.synchronize()
        if progress is not None:
            progress("loading weights", 1.0)

    def _repack(self, tensor: QuantTensor, weight: DeviceWeight, staging: Buffer) -> None:
        """The rows as they are go to the device some at a time, and from there into their layout."""
        self._device.zero(weight.buffer)  # the padding
        n_rows, row_bytes = tensor.data.shape
        step = staging.n_bytes // row_bytes
        for first in range(0, n_rows, step):
            rows = np.ascontiguousarray(tensor.data[first : first + step])
            self._device.upload(staging, rows)
            for launch in build_repack(weight.buffer, weight.layout, staging, first, len(rows)):
                self._device.launch(launch)

    def __getitem__(self, tensor: QuantTensor) -> DeviceWeight:
        return self._weights[id(tensor.data)]

    def vector(self, values: npt.NDArray[np.float32]) -> Buffer:
        """A norm's weight or a bias; uploaded when it is first asked for."""
        held = self._vectors.get(id(values))
        if held is None:
            buffer = self._device.alloc(values.nbytes)
            self._device.upload(buffer, np.ascontiguousarray(values))
            held = self._vectors[id(values)] = (values, buffer)  # the array is kept so that its id stays its own
        return held[1]
