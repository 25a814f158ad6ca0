"""Where a graph may be cut into parts."""

from __future__ import annotations

from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, Quantize, StoreKV


def cut_places(graph: Graph) -> list[int]:
    """Any or all of these: not between a layer's `StoreKV` and its `Attention`, nor behind a `Quantize`."""
    open_layers: set[int] = set()
    found = []
    for index, op in enumerate(graph.ops):
        if index and not open_layers and not isinstance(graph.ops[index - 1], Quantize):
            found.append(index)
        if isinstance(op, StoreKV):
            open_layers.add(op.layer)
        if isinstance(op, Attention):
            open_layers.discard(op.layer)
    return found
