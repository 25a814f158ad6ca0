"""A lowered step, and what every rule of lowering builds on: values in memory, in the forms that their readers want."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyinfer.graph.ops import Value
from pyinfer.graph.passes import AnyMatMul
from pyinfer.kernels_gpu.attention import StepKind
from pyinfer.kernels_gpu.launch import Buffer, Step
from pyinfer.kernels_gpu.operand import Form, Operand
from pyinfer.kernels_gpu.products import operand_form
from pyinfer.kernels_gpu.stage_memory import StageMemory
from pyinfer.kernels_gpu.workspace import ValuePlan


@dataclass(frozen=True, slots=True)
class ProgramShape:
    """What a program is lowered for."""

    kind: StepKind
    n_tokens: int
    n_outputs: int
    n_sequences: int  # at most
    all_rows: bool = False  # the outputs are the tokens, in order


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    steps: tuple[Step, ...]
    results: tuple[Buffer, ...]  # [n_tokens or n_outputs, width], of 4 bytes each; empty buffers without outputs

    @property
    def result(self) -> Buffer:
        """The logits, or a part's first result."""
        return self.results[0]


class ProgramBuilder:
    """The launches so far, and where the values lie that they wrote."""

    def __init__(self, memory: StageMemory, shape: ProgramShape) -> None:
        self.memory, self.shape, self.graph = memory, shape, memory.graph
        self.values = ValuePlan(memory.workspace, memory.graph)
        self.steps: list[Step] = []

    def _rows(self, value: Value) -> int:
        return self.shape.n_tokens if value.rows == "tokens" else self.shape.n_outputs

    def _form(self, value: Value) -> Form:
        """What the readers of a value want: its matmuls' form if nothing else reads it, else float32."""
        forms: set[Form] = set()
        for op in self.memory.readers(value):
            if isinstance(op, AnyMatMul) and op.x is value and op.inputs.count(value) == 1:
                forms.update(operand_form(weight, self._rows(value)) for weight in op.weights)
            else:
                forms.add("f32")
        return forms.pop() if len(forms) == 1 and value not in self.graph.results else "f32"

    def _write(self, value: Value, form: Form = "f32") -> Operand:
        return self.values.write(value, form, self._rows(value))

    def _write_operand(self, value: Value) -> Operand:
        """In the form that its readers want, for ops that can write each."""
        return self._write(value, self._form(value))

    def _vector(self, values: npt.NDArray[np.float32]) -> Buffer:
        return self.memory.weights.vector(values)
