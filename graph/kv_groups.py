"""KV groups: layers whose keys and values share a block table and are given back together.

As vLLM's hybrid KV cache manager has it: layers with a window need only the pages inside it, so layers of different
windows are in different groups, each with its own block table. All groups have pages of the same size, so that one
pool of pages serves them all: a page that a sliding group gives back may next hold the keys of a full one. Where one
kind of layer is more frequent than another, it is split into several groups of about as many layers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One attention layer's cache: keys and values of `n_kv_heads` heads with `head_dim` columns each."""

    n_kv_heads: int
    head_dim: int
    window: int | None = None  # sliding window in tokens; None attends to everything before


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers, as indices into `Graph.kv_layers`; the n-th of each group is in the same place of a page."""

    layers: tuple[int, ...]
    window: int | None = None  # that all of them have; None: pages are kept to the end


MAX_GROUPS = 8  # each has a table to be written in every step
_FULL_PAGES = 8  # a sequence of so many windows: long ones are those that memory runs out for


def one_group(layers: tuple[KVLayer, ...]) -> tuple[KVGroup, ...]:
    """All layers together: right for any model, and gives pages back only where all have the same window."""
    windows = {layer.window for layer in layers}
    return (KVGroup(tuple(range(len(layers))), windows.pop() if len(windows) == 1 else None),)


def group_layers(layers: tuple[KVLayer, ...]) -> tuple[KVGroup, ...]:
    """Groups by window, full attention first, with equal pages; one group if layers differ in shape.

    A page has as many layers as take the least memory, empty places included, of a sequence with `_FULL_PAGES` full
    pages for each sliding one, in at most `MAX_GROUPS` groups; of equals the most, as fewer groups are less work.
    """
    windows = sorted({layer.window for layer in layers}, key=lambda window: (window is not None, window or 0))
    if len({(layer.n_kv_heads, layer.head_dim) for layer in layers}) > 1 or not 1 < len(windows) <= MAX_GROUPS:
        return one_group(layers)
    kinds = [[i for i, layer in enumerate(layers) if layer.window == window] for window in windows]

    def n_groups(size: int) -> list[int]:
        return [-(-len(kind) // size) for kind in kinds]

    def places(size: int) -> int:
        weights = (_FULL_PAGES if window is None else 1 for window in windows)
        return sum(size * n * weight for n, weight in zip(n_groups(size), weights, strict=True))

    sizes = (size for size in range(1, max(map(len, kinds)) + 1) if sum(n_groups(size)) <= MAX_GROUPS)
    size = min(sizes, key=lambda size: (places(size), -size))
    groups = []
    for window, kind in zip(windows, kinds, strict=True):
        n = -(-len(kind) // size)
        groups += [KVGroup(tuple(kind[i::n]), window) for i in range(n)]
    return tuple(groups)
