"""`Graph`: a model as a straight list of ops, with what its KV cache looks like."""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.graph.kv_groups import KVGroup, KVLayer, group_layers
from pyinfer.graph.ops import Hidden, Op, Value

__all__ = ["Graph", "KVGroup", "KVLayer"]


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Ops in execution order; `logits` (rows="outputs", width n_vocab) is what a run returns.

    In a part that `graph.split` cut out, `logits` and `passed` are what later parts read, each with rows and width of its own.
    """

    ops: tuple[Op, ...]
    logits: Value
    kv_layers: tuple[KVLayer, ...]
    n_vocab: int
    n_embd: int
    n_ctx_train: int
    kv_groups: tuple[KVGroup, ...] = ()  # which layers share a block table; never empty once built
    passed: tuple[Value, ...] = ()  # of a part: results beside `logits`

    def __post_init__(self) -> None:
        if not self.kv_groups:
            object.__setattr__(self, "kv_groups", group_layers(self.kv_layers))

    def check(self) -> None:
        """Every value is written once and before it is read; widths agree where an op demands it."""
        written: set[int] = set()
        for op in self.ops:
            for value in op.inputs:
                assert id(value) in written, f"{type(op).__name__} reads {value.name} before it is written"
            for value in op.outputs:
                assert id(value) not in written, f"{value.name} is written twice"
                written.add(id(value))
        for value in self.results:
            assert id(value) in written, f"{value.name}, a result, is never written"
        grouped = sorted(layer for group in self.kv_groups for layer in group.layers)
        assert grouped == list(range(len(self.kv_layers))), "a KV layer is in no group or in several"

    @property
    def results(self) -> tuple[Value, ...]:
        """What a run gives: the logits, or what later parts read."""
        return self.logits, *self.passed

    @property
    def is_head(self) -> bool:
        """Whether a run gives logits."""
        return not self.passed and self.logits.width == self.n_vocab

    def readers(self) -> dict[int, list[Op]]:
        """The ops that read each value, by its id; empty for values that none reads. Results are read by a `Hidden` too."""
        found: dict[int, list[Op]] = {id(value): [] for op in self.ops for value in op.outputs}
        for op in self.ops:
            for value_id in dict.fromkeys(map(id, op.inputs)):
                found[value_id].append(op)
        for value in self.results:
            found[id(value)].append(Hidden(value))
        return found

    @property
    def kv_places(self) -> dict[int, tuple[int, int]]:
        """KV layer -> its group, and its place in that group's pages."""
        return {layer: (g, place) for g, group in enumerate(self.kv_groups) for place, layer in enumerate(group.layers)}

    @property
    def page_layers(self) -> tuple[KVLayer, ...]:
        """The layers of one page, by place: the shape that the layers in this place have in every group."""
        largest = max(self.kv_groups, key=lambda group: len(group.layers))
        return tuple(self.kv_layers[layer] for layer in largest.layers)
