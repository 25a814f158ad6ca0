"""`DecoderBuilder`: emits the ops of decoder-only models, one method a step, under GGUF's tensor names."""

from __future__ import annotations

from collections.abc import Mapping

from pyinfer.graph.graph import Graph, KVLayer
from pyinfer.graph.ops import (
    Activation,
    Add,
    ApplyRope,
    Attention,
    CombineExperts,
    Embed,
    ExpertMatMul,
    GatedActivation,
    MatMul,
    Op,
    RMSNorm,
    RouteExperts,
    SelectRows,
    StoreKV,
    Value,
)
from pyinfer.graph.rope import Rope
from pyinfer.runtime.models.common import ExpertSizes, ModelReader, Sizes


class DecoderBuilder:
    """Appends ops in execution order; tensor names are given without their `.weight` or `.bias`."""

    def __init__(self, reader: ModelReader, sizes: Sizes) -> None:
        self.reader = reader
        self.sizes = sizes
        self.ops: list[Op] = []
        self.kv_layers: list[KVLayer] = []

    def embed(self, scale: float = 1.0) -> Value:
        out = Value("embedding", self.sizes.n_embd)
        self.ops.append(
            Embed(out, self.reader.matrix("token_embd.weight", self.sizes.n_vocab, self.sizes.n_embd), scale)
        )
        return out

    def norm(self, name: str, x: Value, width: int | None = None) -> Value:
        """RMSNorm over the row, or over each group of `width` columns."""
        out = Value(name, x.width, x.rows)
        weight = self.reader.vector(f"{name}.weight", width or x.width)
        self.ops.append(RMSNorm(out, x, weight, self.sizes.eps))
        return out

    def matmul(self, name: str, x: Value, width: int) -> Value:
        """x @ weight.T, plus the bias when the file holds one."""
        out = Value(name, width, x.rows)
        weight = self.reader.matrix(f"{name}.weight", width, x.width)
        bias = self.reader.optional_vector(f"{name}.bias", width)
        self.ops.append(MatMul((out,), x, (weight,), (bias,)))
        return out

    def split_matmul(self, name: str, x: Value, widths: Mapping[str, int]) -> tuple[Value, ...]:
        """Matmuls of x whose weights are stored as one, rows of the first before those of the next; by name and width."""
        whole = self.reader.matrix(f"{name}.weight", sum(widths.values()), x.width)
        biases = self.reader.optional_vector(f"{name}.bias", sum(widths.values()))
        outs, first = [], 0
        for out_name, width in widths.items():
            stop = first + width
            outs.append(Value(out_name, width, x.rows))
            bias = None if biases is None else biases[first:stop]
            self.ops.append(MatMul((outs[-1],), x, (whole.part(first, stop),), (bias,)))
            first = stop
        return tuple(outs)

    def rope(self, x: Value, rope: Rope) -> Value:
        out = Value(f"{x.name}.rope", x.width)
        self.ops.append(ApplyRope(out, x, self.sizes.head_dim, rope))
        return out

    def attention(self, q: Value, k: Value, v: Value, scale: float, window: int | None = None) -> Value:
        """Store this layer's keys and values, then attend; opens the next KV layer."""
        layer = len(self.kv_layers)
        self.kv_layers.append(KVLayer(self.sizes.n_kv_heads, self.sizes.head_dim, window))
        out = Value(f"attention.{layer}", q.width)
        self.ops.append(StoreKV(k, v, layer))
        self.ops.append(Attention(out, q, layer, self.sizes.n_heads, scale))
        return out

    def feed_forward(
        self,
        prefix: str,
        x: Value,
        activation: Activation,
        *,
        is_fused: bool = False,
        experts: ExpertSizes | None = None,
    ) -> Value:
        """down(activation(gate(x)) * up(x)), or that of experts; fused: `ffn_up` holds the rows of gate, then those of up."""
        if experts is not None:
            return self._experts(prefix, x, activation, experts)
        names = f"{prefix}.ffn_gate", f"{prefix}.ffn_up"
        if is_fused:
            gate, up = self.split_matmul(names[1], x, dict.fromkeys(names, self.sizes.n_ff))
        else:
            gate, up = (self.matmul(name, x, self.sizes.n_ff) for name in names)
        return self.matmul(f"{prefix}.ffn_down", self._gated(prefix, gate, up, activation), self.sizes.n_embd)

    def _gated(self, prefix: str, gate: Value, up: Value, activation: Activation) -> Value:
        gated = Value(f"{prefix}.ffn_gated", gate.width, gate.rows)
        self.ops.append(GatedActivation(gated, gate, up, activation))
        return gated

    def _experts(self, prefix: str, x: Value, activation: Activation, sizes: ExpertSizes) -> Value:
        """The weighted sum of what the experts that `ffn_gate_inp` chooses for a row make of it, and the shared expert."""
        logits = self.matmul(f"{prefix}.ffn_gate_inp", x, sizes.n_experts)
        experts = Value(f"{prefix}.experts", sizes.n_used, x.rows, "i32")
        weights = Value(f"{prefix}.expert_weights", sizes.n_used, x.rows)
        self.ops.append(RouteExperts(experts, weights, logits, sizes.normalize))
        gate, up = (self._expert_matmul(f"{prefix}.{name}_exps", x, experts, sizes) for name in ("ffn_gate", "ffn_up"))
        gated = self._gated(prefix, gate, up, activation)
        down = self._expert_matmul(f"{prefix}.ffn_down_exps", gated, experts, sizes)
        out = Value(f"{prefix}.ffn_experts", self.sizes.n_embd, x.rows)
        self.ops.append(CombineExperts(out, down, weights))
        if sizes.shared_n_ff is not None:
            out = self._shared_expert(prefix, x, activation, sizes.shared_n_ff, out)
        return out

    def _shared_expert(self, prefix: str, x: Value, activation: Activation, n_ff: int, others: Value) -> Value:
        """`others` + sigmoid(gate of the row) * the shared expert: a choice of one among one."""
        logit = Value(f"{prefix}.ffn_gate_inp_shexp", 1, x.rows)
        weight = self.reader.row(f"{prefix}.ffn_gate_inp_shexp.weight", x.width)
        self.ops.append(MatMul((logit,), x, (weight,), (None,)))
        only, share = Value(f"{prefix}.shared_expert", 1, x.rows, "i32"), Value(f"{prefix}.share", 1, x.rows)
        self.ops.append(RouteExperts(only, share, logit, normalize=False, scoring="sigmoid"))
        gate, up = (self.matmul(f"{prefix}.{name}_shexp", x, n_ff) for name in ("ffn_gate", "ffn_up"))
        gated = self._gated(f"{prefix}.shared", gate, up, activation)
        down = self.matmul(f"{prefix}.ffn_down_shexp", gated, self.sizes.n_embd)
        out = Value(f"{prefix}.ffn_out", self.sizes.n_embd, x.rows)
        self.ops.append(CombineExperts(out, down, share, others))
        return out

    def _expert_matmul(self, name: str, x: Value, experts: Value, sizes: ExpertSizes) -> Value:
        """From n_embd columns to each expert's, or from those of every slot back."""
        n_out, n_in = sizes.n_ff, self.sizes.n_embd
        if name.endswith("ffn_down_exps"):
            n_out, n_in = n_in, n_out
        out = Value(name, sizes.n_used * n_out, x.rows)
        weight = self.reader.experts(f"{name}.weight", sizes.n_experts, n_out, n_in)
        self.ops.append(ExpertMatMul((out,), x, experts, (weight,)))
        return out

    def add(self, a: Value, b: Value) -> Value:
        out = Value(f"{a.name}+", a.width, a.rows)
        self.ops.append(Add(out, a, b))
        return out

    def select_outputs(self, *values: Value) -> tuple[Value, ...]:
        """Only the rows whose logits are asked for, of each value: what follows skips the others."""
        outs = tuple(Value(f"{value.name}.outputs", value.width, "outputs") for value in values)
        self.ops.extend(SelectRows(out, value) for out, value in zip(outs, values, strict=True))
        return outs

    def finish(self, x: Value) -> Graph:
        """Final norm and logits; a file without `output.weight` ties it to the embedding."""
        x = self.norm("output_norm", x)
        if self.reader.has("output.weight"):
            logits = self.matmul("output", x, self.sizes.n_vocab)
        else:
            logits = Value("output", self.sizes.n_vocab, x.rows)
            table = self.reader.matrix("token_embd.weight", self.sizes.n_vocab, self.sizes.n_embd)
            bias = self.reader.optional_vector("output.bias", self.sizes.n_vocab)
            self.ops.append(MatMul((logits,), x, (table,), (bias,)))
        self.reader.check_all_taken()
        graph = Graph(
            ops=tuple(self.ops),
            logits=logits,
            kv_layers=tuple(self.kv_layers),
            n_vocab=self.sizes.n_vocab,
            n_embd=self.sizes.n_embd,
            n_ctx_train=self.sizes.n_ctx_train,
        )
        graph.check()
        return graph
