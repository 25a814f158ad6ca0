"""Which type each tensor gets: as llama-quantize decides, and as the user overrides."""

from __future__ import annotations

import json
import lzma

import pytest
from llamacpp_quantize import CASES, PLANS

from pyinfer.convert.file_types import FILE_TYPES, file_type
from pyinfer.convert.type_plan import (
    ModelShape,
    PlannedType,
    PlanOptions,
    TensorSpec,
    fitting_type,
    is_quantizable,
    model_shape,
    plan_types,
)
from pyinfer.errors import ConfigError

pytestmark = pytest.mark.unit

SPECS = [
    TensorSpec("token_embd.weight", (64, 512), "F32"),
    TensorSpec("blk.0.attn_v.weight", (64, 512), "F32"),
    TensorSpec("blk.0.attn_norm.weight", (512,), "F32"),
    TensorSpec("blk.0.ffn_gate.weight", (64, 512), "F32"),
    TensorSpec("output.weight", (64, 512), "F32"),
]
MODEL = ModelShape(n_layers=8)


def plan(type_name: str, options: PlanOptions | None = None) -> dict[str, str]:
    return {
        name: p.codec for name, p in plan_types(SPECS, file_type(type_name), MODEL, options or PlanOptions()).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_types_are_those_of_llama_quantize(case: str) -> None:
    expected = json.loads(lzma.decompress(PLANS.read_bytes()))[case]
    options = PlanOptions(has_imatrix=CASES[case].has_imatrix)
    assert expected.keys() == FILE_TYPES.keys()
    for target, types in expected.items():
        found = plan_types(CASES[case].specs, FILE_TYPES[target], CASES[case].model, options)
        assert {name: planned.codec for name, planned in found.items()} == types, target


def test_order_of_the_tensors_does_not_matter() -> None:
    case = CASES["llama"]
    target = file_type("q4_k_m")
    forwards = plan_types(case.specs, target, case.model)
    assert plan_types(reversed(case.specs), target, case.model) == forwards
    assert list(forwards) == [spec.name for spec in case.specs]


def test_overrides() -> None:
    assert plan("q4_k_s", PlanOptions(output_type="q8_0"))["output.weight"] == "Q8_0"
    assert plan("q4_k_s", PlanOptions(token_embedding_type="Q2_K"))["token_embd.weight"] == "Q2_K"
    by_name = PlanOptions(tensor_types=((r"attn_v", "q6_k"), (r"blk\.0\.", "f16"), ("norm", "q4_0")))
    assert plan("q4_0", by_name) == {
        "token_embd.weight": "Q4_0",
        "blk.0.attn_v.weight": "Q6_K",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.ffn_gate.weight": "F16",
        "output.weight": "Q6_K",
    }
    assert set(plan("q3_k_m", PlanOptions(pure=True)).values()) == {"Q3_K", "F32"}
    assert set(plan("f16").values()) == {"F16", "F32"}


@pytest.mark.parametrize(
    "options",
    [{"output_type": "q9"}, {"tensor_types": (("x", "iq2_xxs"),)}, {"tensor_types": (("(", "q4_0"),)}],
)
def test_overrides_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"q9|iq2_xxs|\("):
        PlanOptions(**options)  # type: ignore[arg-type]


def test_unknown_file_type_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'q4_k_x' is not a type.*Q4_K_M"):
        file_type("q4_k_x")
    assert file_type("q4_k") is FILE_TYPES["Q4_K_M"]


def test_rows_that_do_not_fill_blocks() -> None:
    assert [fitting_type("Q4_K", n) for n in (512, 288, 40)] == ["Q4_K", "Q5_0", "F16"]
    assert fitting_type("Q8_0", 40) == "F16"
    planned = plan_types([TensorSpec("blk.0.attn_q.weight", (8, 288), "F32")], file_type("q6_k"), MODEL)
    assert planned["blk.0.attn_q.weight"] == PlannedType("Q8_0", wanted="Q6_K")
    assert planned["blk.0.attn_q.weight"].is_fallback


def test_what_is_never_quantized() -> None:
    assert is_quantizable("blk.0.attn_q.weight", (8, 8))
    assert is_quantizable("blk.0.ffn_up_exps.weight", (4, 8, 8))
    for name, shape in (
        ("blk.0.attn_q.bias", (8, 8)),
        ("blk.0.attn_norm.weight", (8,)),
        ("blk.0.attn_q_norm.weight", (8, 8)),
        ("blk.0.ffn_gate_inp.weight", (8, 8)),
        ("position_embd.weight", (8, 8)),
        ("token_types.weight", (2, 8)),
        ("rope_freqs.weight", (1, 32)),
    ):
        assert not is_quantizable(name, shape), name


def test_model_shape_from_metadata() -> None:
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.block_count": 18,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": [1, 2],
    }
    assert model_shape(metadata) == ModelShape(18, 4, 1, 0, "gemma3")
