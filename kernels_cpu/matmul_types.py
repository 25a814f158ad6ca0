"""The registry of block types that have an integer matmul; float types are in `matmul_float`."""

from __future__ import annotations

from pyinfer.kernels_cpu.matmul_q2_k import Q2_K
from pyinfer.kernels_cpu.matmul_q3_k import Q3_K
from pyinfer.kernels_cpu.matmul_q4_0 import Q4_0
from pyinfer.kernels_cpu.matmul_q4_1 import Q4_1
from pyinfer.kernels_cpu.matmul_q4_k import Q4_K
from pyinfer.kernels_cpu.matmul_q5_0 import Q5_0
from pyinfer.kernels_cpu.matmul_q5_1 import Q5_1
from pyinfer.kernels_cpu.matmul_q5_k import Q5_K
from pyinfer.kernels_cpu.matmul_q6_k import Q6_K
from pyinfer.kernels_cpu.matmul_q8_0 import Q8_0
from pyinfer.kernels_cpu.weight_format import BlockSource

_SOURCES: tuple[BlockSource, ...] = (
    Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0(), Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K(),
)  # fmt: skip
BLOCK_SOURCES: dict[str, BlockSource] = {source.format.name: source for source in _SOURCES}
