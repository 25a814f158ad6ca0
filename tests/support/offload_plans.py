"""The plan that a GPU's memory allows, without opening anything."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfer.graph.backend import DeviceInfo, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.runtime.offload import GPULayers, OffloadPlan, candidates, make_plan


def plan_offload(
    graph: Graph,
    config: StageConfig,
    devices: Sequence[DeviceInfo],
    layers: GPULayers,
    utilization: float,
    n_cpu_experts: int = 0,
) -> OffloadPlan:
    """The largest of the `candidates` that leaves room for the KV pages of `config`."""
    for offload in candidates(layers, len(graph.kv_layers), n_cpu_experts):
        plan = make_plan(graph, config, devices, offload, utilization)
        if plan.max_pages() >= config.n_pages:
            return plan
    raise AssertionError("nothing on a GPU always fits")
