"""`Graph`: a model as a straight list of ops, with what its KV cache looks like."""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.graph.ops import Op, Value


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One attention layer's cache: keys and values of `n_kv_heads` heads with `head_dim` columns each."""

    n_kv_heads: int
    head_dim: int
    window: int | None = None  # sliding window in tokens; None attends to everything before


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Ops in execution order; `logits` (rows="outputs", width n_vocab) is what a run returns."""

    ops: tuple[Op, ...]
    logits: Value
    kv_layers: tuple[KVLayer, ...]
    n_vocab: int
    n_embd: int
    n_ctx_train: int

    def check(self) -> None:
        """Every value is written once and before it is read; widths agree where an op demands it."""
        written: set[int] = set()
        for op in self.ops:
            for value in op.inputs:
                assert id(value) in written, f"{type(op).__name__} reads {value.name} before it is written"
            for value in op.outputs:
                assert id(value) not in written, f"{value.name} is written twice"
                written.add(id(value))
        assert id(self.logits) in written, "logits are never written"

    def consumers(self, value: Value) -> list[Op]:
        return [op for op in self.ops if any(v is value for v in op.inputs)]

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token takes over all layers."""
        return sum(2 * layer.n_kv_heads * layer.head_dim * element_bytes for layer in self.kv_layers)
