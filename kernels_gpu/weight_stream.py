"""`WeightStream`: matrices that stay in host memory as in the file and come to the device part by part, each time it runs.

While a part is computed, the next two are on their way on a second stream, into two buffers of raw blocks in turn. The main
stream repacks a part's blocks from there as they are repacked at load (`repack`), into memory that all parts share; after that
the buffer is free for the part after the next one. Bound by the bus: 25 GB/s of PCIe 4, 50 of PCIe 5, if host memory can be
pinned in place. Where it cannot, a thread copies through pinned pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.graph import Graph
from pyinfer.graph.split import weights_of
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.repack import build_repack, can_repack
from pyinfer.kernels_gpu.weights import DeviceWeight, DeviceWeights
from pyinfer.kernels_gpu.weights_layout import WeightLayout, layout_of
from pyinfer.quant.tensor import QuantTensor

_ALIGNMENT = 256
_SLOTS = 2


@dataclass(frozen=True, slots=True)
class _Place:
    tensor: QuantTensor
    layout: WeightLayout
    raw: int  # bytes from the start of a slot
    packed: int  # bytes from the start of what the parts share


class WeightStream:
    """Of parts that run one after another, from the first to the last."""

    def __init__(self, device: Device, graphs: Sequence[Graph], resident: DeviceWeights) -> None:
        """`resident` holds their vectors."""
        self._device, self._resident = device, resident
        places = [_places(graph) for graph in graphs]
        self._parts = [part for part, _, _ in places]
        slot = max(raw for _, raw, _ in places)
        self._slots = [device.alloc(slot) for _ in range(_SLOTS)]
        self._packed = device.alloc(max(packed for _, _, packed in places))
        is_pinned = device.pin([place.tensor.data for part in self._parts for place in part])
        self._threads = None if is_pinned else ThreadPoolExecutor(1, "pyinfer-weights")
        self._copies: dict[int, Future[None] | None] = {}  # of parts that are on their way

    def part(self, number: int) -> PartStream:
        weights = {
            id(place.tensor.data): DeviceWeight(place.layout, self._packed.at(place.packed, place.layout.n_bytes))
            for place in self._parts[number]
        }
        return PartStream(self, number, weights, self._resident)

    def bring(self, number: int) -> None:
        """Have a part's matrices where its programs read them, in the order of the main stream."""
        if number not in self._copies:
            self._drop()
            for part in range(number, min(number + _SLOTS, len(self._parts))):
                self._fetch(part)
        copy, slot = self._copies.pop(number), number % _SLOTS
        if copy is not None:
            copy.result()
        device = self._device
        device.wait_for_copies(slot)
        device.zero(self._packed)  # the padding
        for place in self._parts[number]:
            target = self._packed.at(place.packed, place.layout.n_bytes)
            raw = self._slots[slot].at(place.raw, place.tensor.data.nbytes)
            if can_repack(place.layout):
                for launch in build_repack(target, place.layout, raw, 0, place.layout.n_rows):
                    device.launch(launch)
            else:
                device.copy(target, raw, raw.n_bytes)
        device.end_of_slot(slot)
        if number + _SLOTS < len(self._parts):
            self._fetch(number + _SLOTS)

    def close(self) -> None:
        self._drop()
        if self._threads is not None:
            self._threads.shutdown()

    def _fetch(self, number: int) -> None:
        slot = number % _SLOTS
        copies = [
            (self._slots[slot].at(place.raw, place.tensor.data.nbytes), place.tensor.data)
            for place in self._parts[number]
        ]
        if self._threads is None:
            self._device.copy_aside(slot, copies)
            self._copies[number] = None
        else:
            self._copies[number] = self._threads.submit(self._device.copy_aside, slot, copies)

    def _drop(self) -> None:
        """Wait for copies that a step which failed has left, so that none comes behind newer ones."""
        for copy in self._copies.values():
            if copy is not None:
                copy.exception()
        self._copies.clear()


class PartStream:
    """The matrices of one part, as `DeviceWeights` has them; `bring` them before its programs run."""

    def __init__(
        self, stream: WeightStream, number: int, weights: dict[int, DeviceWeight], resident: DeviceWeights
    ) -> None:
        self._stream, self._number, self._weights, self._resident = stream, number, weights, resident

    def __getitem__(self, tensor: QuantTensor) -> DeviceWeight:
        return self._weights[id(tensor.data)]

    def vector(self, values: npt.NDArray[np.float32]) -> Buffer:
        return self._resident.vector(values)

    def bring(self) -> None:
        self._stream.bring(self._number)


def _places(graph: Graph) -> tuple[list[_Place], int, int]:
    """A part's matrices, and the bytes of all raw and of all packed ones."""
    places, raw, packed = [], 0, 0
    for tensor in weights_of(graph):
        layout = layout_of(tensor.codec.name, tensor.data.shape[0], tensor.shape[-1])
        assert can_repack(layout) or layout.n_bytes == tensor.data.nbytes, f"{tensor.name} has rows of odd bytes"
        places.append(_Place(tensor, layout, raw, packed))
        raw += -(-tensor.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        packed += -(-layout.n_bytes // _ALIGNMENT) * _ALIGNMENT
    return places, raw, packed
