"""KV groups: layers of one window together, pages of equal size, few places left empty."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyinfer.graph.kv_groups import MAX_GROUPS, KVGroup, KVLayer, group_layers, one_group

pytestmark = pytest.mark.unit


def layers_of(n: int, every: int, window: int = 512) -> tuple[KVLayer, ...]:
    """Each `every`-th layer attends to everything, as in Gemma 3."""
    return tuple(KVLayer(1, 256, None if (i + 1) % every == 0 else window) for i in range(n))


@pytest.mark.parametrize(
    ("n", "every", "n_groups", "size"),
    [(18, 6, 6, 3), (26, 6, 7, 4), (34, 6, 7, 5), (48, 6, 6, 8), (62, 6, 7, 10), (24, 2, 2, 12), (4, 2, 2, 2)],
)
def test_groups_of_equal_pages(n: int, every: int, n_groups: int, size: int) -> None:
    """Gemma 3's 270M, 1B, 4B, 12B and 27B, and layers that alternate."""
    layers = layers_of(n, every)
    groups = group_layers(layers)
    assert len(groups) == n_groups <= MAX_GROUPS
    assert max(len(group.layers) for group in groups) == size
    assert sorted(layer for group in groups for layer in group.layers) == list(range(n))
    assert all(layers[layer].window == group.window for group in groups for layer in group.layers)
    assert groups[0].window is None and size * n_groups <= 1.13 * n


def test_models_of_one_kind_have_one_group() -> None:
    for window in (None, 4096):
        layers = (KVLayer(2, 64, window),) * 30
        assert group_layers(layers) == one_group(layers) == (KVGroup(tuple(range(30)), window),)
    assert group_layers(()) == (KVGroup(()),)


def test_layers_of_different_shapes_stay_together_and_keep_all_pages() -> None:
    layers = layers_of(6, 3)
    layers = (*layers[:5], replace(layers[5], head_dim=512))
    assert group_layers(layers) == (KVGroup(tuple(range(6)), None),)


def test_three_windows() -> None:
    layers = tuple(KVLayer(1, 64, window) for window in (None, 128, 4096, 128))
    groups = group_layers(layers)
    assert [(group.window, group.layers) for group in groups] == [
        (None, (0,)),
        (128, (1,)),
        (128, (3,)),
        (4096, (2,)),
    ]
