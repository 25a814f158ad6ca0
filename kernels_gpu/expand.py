"""Float16 copies of packed matrices, kept beside them for cuBLAS (`--gpu-expand auto|on|off`).

A prompt's step through a copy need not make the weights float16 first. By `benchmarks/gpu_limits.py`, not yet measured, that
is 3 to 5 ms less of 16 to 48 for 512 to 2,048 rows of Llama-3.1-8B on an H200, at 14 GB of memory that KV pages could have.
Decode goes on reading the packed matrix, which is a quarter of it. The head is not copied: few rows go through it.
`runtime.offload` decides whether there is room.
"""

from __future__ import annotations

from pyinfer.graph.graph import Graph
from pyinfer.graph.split import expandable_weights
from pyinfer.kernels_gpu.device import Device
from pyinfer.kernels_gpu.launch import Buffer
from pyinfer.kernels_gpu.matmul import float16_of, gain_of
from pyinfer.kernels_gpu.unpack import build_dequantize
from pyinfer.kernels_gpu.weights import DeviceWeights


def make_copies(device: Device, graph: Graph, weights: DeviceWeights) -> dict[int, Buffer]:
    """Address of a packed matrix -> its copy, float16 [rows, columns], `gain_of` times the weights."""
    copies: dict[int, Buffer] = {}
    for tensor in expandable_weights(graph):
        weight = weights[tensor]
        if float16_of(weight, copies) is None:
            copy = device.alloc(2 * tensor.n_elements)
            for step in build_dequantize(copy, weight, gain=gain_of(tensor.codec.name)):
                device.launch(step)
            copies[weight.buffer.ptr] = copy
    return copies
