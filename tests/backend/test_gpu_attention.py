"""Attention kernels on the emulator against NumPy in float64: all types of pages, shapes of heads, windows, mixed steps.

Pages hold NaN wherever no token of the sequence is, and behind its window, so a kernel that reads there fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from gpu_matrices import a8_codes
from gpu_pages import PagedStep, Pool, Span, layer_pages

from pyinfer.errors import ModelError
from pyinfer.graph.activation import quantize_activation
from pyinfer.graph.reference import apply_rope, rms_norm
from pyinfer.graph.rope import Rope
from pyinfer.kernels_gpu.attention import (
    AttentionScratch,
    AttentionShape,
    FusedRope,
    QueryRope,
    StepKind,
    StepShape,
    build_attention,
    can_fuse_rope,
    direct_form,
    scratch_sizes,
)
from pyinfer.kernels_gpu.operand import Form, Operand, operand_at, operand_bytes
from pyinfer.kernels_gpu.rope import HeadNorms, HeadShape, build_rope_angles, rope_frequencies

pytestmark = [pytest.mark.backend, pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")]
F32Array = npt.NDArray[np.float32]
TYPES = [("bf16", "q8_0"), ("q8_0", "bf16"), ("bf16", "bf16"), ("f32", "f16")]


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


@dataclass(frozen=True)
class Case:
    """One layer and one step."""

    spans: Sequence[Span]
    kind: StepKind = "decode"
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    types: tuple[str, str] = ("f16", "f16")
    form: Form = "f32"
    padding: int = 0
    magnitude: float = 1.0  # of queries and keys
    fused: Rope | None = None
    turned: Rope | None = None  # of queries alone
    with_norms: bool = False
    exact_queries: bool = False

    @property
    def shape(self) -> AttentionShape:
        heads = HeadShape(self.n_heads, self.n_kv_heads, self.head_dim, self.block_size)
        return AttentionShape(heads, self.head_dim**-0.5, self.window, 4096, self.exact_queries)


def attend(case: Case, step: PagedStep, q: F32Array, keys: Pool, values: Pool) -> F32Array:
    """Row by row, in float64."""
    out = np.zeros((step.n_tokens, case.n_heads, case.head_dim))
    for row in range(step.n_real):
        position, sequence = int(step.positions[row]), int(step.sequence_of_token[row])
        slots = step.slots_of(sequence, max(0, position + 1 - (case.window or position + 1)), position + 1)
        k, v = keys.read(slots).astype(np.float64), values.read(slots).astype(np.float64)
        for head in range(case.n_heads):
            shared = head * case.n_kv_heads // case.n_heads
            scores = k[:, shared] @ q[row].reshape(case.n_heads, -1)[head].astype(np.float64) * case.shape.scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v[:, shared] / weights.sum()
    return out.reshape(step.n_tokens, -1).astype(np.float32)


def run(device: EmulatedDevice, case: Case, seed: int = 0) -> None:
    """Launch the case and compare; twice, so that what is left behind in the scratch is seen to be fit for the next layer."""
    rng = np.random.default_rng(seed)
    step = PagedStep(
        case.spans, case.block_size, rng, sum(s.count for s in case.spans) + case.padding, len(case.spans) + 3
    )
    size = StepShape(case.kind, step.n_tokens, step.max_sequences)
    keys, values = (Pool(step, kind, case.n_kv_heads, case.head_dim) for kind in case.types)
    q = rng.normal(0, case.magnitude, (step.n_tokens, case.shape.width)).astype(np.float32)
    k, v = (
        rng.normal(0, magnitude, (step.n_tokens, case.n_kv_heads * case.head_dim)).astype(np.float32)
        for magnitude in (case.magnitude, 1.0)
    )
    for sequence, span in enumerate(case.spans):  # what is visible to the first token, before the step
        first = max(0, span.start + 1 - case.window) if case.window else 0
        for pool, magnitude in ((keys, case.magnitude), (values, 1.0)):
            end = span.start if case.fused else span.end
            old = rng.normal(0, magnitude, (end - first, case.n_kv_heads, case.head_dim)).astype(np.float32)
            pool.write(step.slots_of(sequence, first, end), old)
    pages = layer_pages(device, keys, values)
    expected_q, fused, turns = q, None, None
    fields = step.fields(device)
    if case.turned is not None:
        angles = device.empty(step.n_tokens, case.turned.n_dims)
        frequencies = device.array(rope_frequencies(case.turned))
        for launch in build_rope_angles(angles, case.turned, frequencies, fields, step.n_tokens):
            device.launch(launch)
        turns = QueryRope(case.turned, angles)
        expected_q = apply_rope(q, case.head_dim, case.turned, step.positions)
    if case.fused is not None:
        weights = [rng.normal(1, 0.3, case.head_dim).astype(np.float32) for _ in range(2)]
        angles = device.empty(step.n_tokens, case.fused.n_dims)
        frequencies = device.array(rope_frequencies(case.fused))
        for launch in build_rope_angles(angles, case.fused, frequencies, fields, step.n_tokens):
            device.launch(launch)
        norms = HeadNorms(device.array(weights[0]), device.array(weights[1]), 1e-6) if case.with_norms else None
        fused = FusedRope(device.array(k), device.array(v), case.fused, angles, norms)
        expected_q, expected_k = (
            apply_rope(rms_norm(x, w, 1e-6) if case.with_norms else x, case.head_dim, case.fused, step.positions)
            for x, w in zip((q, k), weights, strict=True)
        )
        for pool, x in ((keys, expected_k), (values, v)):
            pool.write(step.slots[: step.n_real], x[: step.n_real].reshape(step.n_real, case.n_kv_heads, -1))
    expected = attend(case, step, expected_q, keys, values)

    need = scratch_sizes(case.form, case.shape, size, pages, device)
    scratch = AttentionScratch(
        device.alloc(max(need.partial, 16)),
        device.alloc(max(need.tickets, 16)),
        device.alloc(need.rows) if need.rows else None,
    )
    device.zero(scratch.tickets)
    for turn in range(2):
        memory = device.alloc(operand_bytes(case.form, step.n_tokens, case.shape.width))
        out = operand_at(case.form, step.n_tokens, case.shape.width, memory)
        if turn and direct_form(case.form, case.shape, size, pages, device) == "h16":
            out = replace(out, scales=None)
        queries = device.array(q)
        for launch in build_attention(out, queries, case.shape, size, fields, pages, device, scratch, fused, turns):
            device.launch(launch)
        check(device, out, expected, case)
    if need.tickets:
        assert not device.values(scratch.tickets, np.int32).any()


def check(device: EmulatedDevice, out: Operand, expected: F32Array, case: Case) -> None:
    n, width = expected.shape
    if out.form == "f32":
        got = device.values(out.data, np.float32, n, width)
    elif out.form == "h16":
        got = device.values(out.data, np.float16, n, width).astype(np.float32)
        if out.scales is not None:
            got *= device.values(out.scales, np.float32, out.scales.n_bytes // 4)[:n, None]
    else:
        assert out.scales is not None and out.sums is not None
        codes = a8_codes(device, out, n).astype(np.float32)
        scales, sums = (
            device.values(part, np.float32, part.n_bytes // 4)[: n * width // 32].reshape(n, -1)
            for part in (out.scales, out.sums)
        )
        np.testing.assert_allclose(sums, codes.sum(axis=2) * scales, rtol=1e-6)
        got = (codes * scales[:, :, None]).reshape(n, width)
        assert np.abs(got - quantize_activation(expected).dequantize()).max() <= scales.max() * 1.01
        return
    assert np.isfinite(got).all()
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    limit = 1e-3 if case.kind != "decode" or case.form == "h16" else 1e-5
    assert error <= limit, error
    real = np.abs(expected).max(axis=1) > 0
    assert (np.abs(got - expected).max(axis=1)[real] <= 3 * limit * np.abs(expected).max(axis=1)[real]).all()
    assert not got[~real].any()


DECODES = {
    "one": Case([Span(300)]),
    "first token": Case([Span(0)]),
    "several": Case([Span(5), Span(777), Span(64), Span(0), Span(255)], padding=3),
    "few tokens of a sequence": Case([Span(20, 5), Span(3, 2)], padding=1),
    "one head each": Case([Span(90), Span(257)], n_heads=2),
    "group of 7": Case([Span(90), Span(257)], n_heads=14, head_dim=96),
    "group of 8": Case([Span(130)], n_heads=8, n_kv_heads=1, head_dim=128),
    "group of 12, two passes": Case([Span(400), Span(10)], n_heads=24, head_dim=32),
    "head 80": Case([Span(150), Span(33)], head_dim=80),
    "head 256": Case([Span(350), Span(33)], n_heads=4, n_kv_heads=1, head_dim=256),
    "head 16": Case([Span(350), Span(33)], head_dim=16),
    "window": Case([Span(500), Span(40), Span(63), Span(64)], window=64),
    "window of one": Case([Span(17), Span(0)], window=1),
    "block of 1": Case([Span(70)], block_size=1),
    "block of 13": Case([Span(170), Span(38)], block_size=13, window=100),
    "peaked": Case([Span(300), Span(40)], magnitude=6.0),
    "a8": Case([Span(300), Span(40)], form="a8", padding=1),
    "a8, head 80 alone": Case([Span(300)], n_heads=2, head_dim=80, form="a8", padding=1),
    "h16": Case([Span(300), Span(40)], form="h16", padding=1),
    "h16 of bf16": Case([Span(300), Span(40)], form="h16", types=("f16", "bf16")),
}


@pytest.mark.parametrize("case", DECODES.values(), ids=DECODES.keys())
def test_decode(device: EmulatedDevice, case: Case) -> None:
    run(device, case)


@pytest.mark.parametrize("types", TYPES, ids=",".join)
def test_decode_of_every_type(device: EmulatedDevice, types: tuple[str, str]) -> None:
    run(device, Case([Span(140), Span(37)], types=types, n_heads=4))


FUSED = {
    "half": Case([Span(300), Span(0), Span(15), Span(16)], fused=Rope(64, "half", 1e4), padding=1),
    "interleaved": Case([Span(130)], head_dim=128, fused=Rope(128, "interleaved", 5e5), form="a8"),
    "norms": Case([Span(130), Span(600)], head_dim=128, fused=Rope(128, "half", 1e6), with_norms=True, window=100),
    "q8_0": Case([Span(130), Span(31)], types=("q8_0", "q8_0"), fused=Rope(64, "half", 1e4)),
    "head 80": Case([Span(130)], types=("bf16", "f32"), head_dim=80, fused=Rope(40, "half", 1e4), n_heads=14),
}


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())
def test_decode_with_rope_and_store(device: EmulatedDevice, case: Case) -> None:
    run(device, case)


PROMPTS = {
    "one": Case([Span(0, 70)]),
    "continued": Case([Span(100, 40)]),
    "several": Case([Span(0, 20), Span(33, 1), Span(7, 50), Span(200, 3)], padding=40),
    "one head each": Case([Span(3, 150)], n_heads=2),
    "group of 3": Case([Span(0, 90)], n_heads=9, n_kv_heads=3, head_dim=96),
    "group of 7": Case([Span(0, 31), Span(50, 9)], n_heads=14),
    "group of 20, two passes": Case([Span(9, 21)], n_heads=20, n_kv_heads=1),
    "head 80": Case([Span(0, 40)], head_dim=80),
    "head 128": Case([Span(10, 80)], head_dim=128),
    "head 256": Case([Span(10, 40)], n_heads=4, n_kv_heads=1, head_dim=256),
    "head 24, one by one": Case([Span(10, 12)], head_dim=24),
    "window": Case([Span(150, 60), Span(0, 100)], window=40),
    "block of 13": Case([Span(70, 50)], block_size=13, window=64),
    "peaked": Case([Span(0, 90)], magnitude=2.5),
    "very peaked": Case([Span(0, 90)], magnitude=6.0, exact_queries=True),
    "h16": Case([Span(0, 50)], form="h16", padding=7),
    "h16 of bf16": Case([Span(0, 50)], form="h16", types=("f16", "bf16"), padding=7),
    "a8": Case([Span(0, 7)], form="a8", padding=1),
    "wide tiles": Case([Span(150, 60), Span(0, 30)], n_kv_heads=4, n_heads=16, window=40),
    "wide tiles of many warps": Case([Span(20, 200), Span(0, 60)], n_kv_heads=4, n_heads=16, padding=20),
}


TURNED = {
    "half": Case([Span(0, 70), Span(30, 9)], turned=Rope(64, "half", 1e4), padding=3),
    "interleaved": Case([Span(10, 40)], turned=Rope(64, "interleaved", 5e5)),
    "some columns": Case([Span(10, 40)], n_heads=6, turned=Rope(32, "half", 1e4), exact_queries=True),
    "some columns, interleaved": Case([Span(10, 40)], head_dim=128, turned=Rope(64, "interleaved", 1e4), form="h16"),
    "wide tiles": Case([Span(20, 200)], n_kv_heads=4, n_heads=16, turned=Rope(64, "half", 1e4)),
}


@pytest.mark.parametrize("case", TURNED.values(), ids=TURNED.keys())
def test_prompt_that_turns_queries(device: EmulatedDevice, case: Case) -> None:
    run(device, replace(case, kind="prompt"))


@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS.keys())
def test_prompt(device: EmulatedDevice, case: Case) -> None:
    run(device, replace(case, kind="prompt"))


@pytest.mark.parametrize("types", TYPES, ids=",".join)
def test_prompt_of_every_type(device: EmulatedDevice, types: tuple[str, str]) -> None:
    run(device, Case([Span(40, 33)], "prompt", types=types, n_heads=4))


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "bf16"), ("f32", "f32")])
def test_mixed_step(device: EmulatedDevice, types: tuple[str, str]) -> None:
    spans = [Span(300), Span(12), Span(0, 40), Span(77), Span(50, 4), Span(9, 5), Span(600)]
    run(device, Case(spans, "mixed", types=types, padding=12))
    run(device, Case(spans[:2], "mixed", types=types, padding=30))
    run(device, Case(spans[2:3], "mixed", types=types, padding=1))


def test_decode_on_a_large_card() -> None:
    """One sequence goes to all multiprocessors: as many splits as there may be, and fewer where the sequence is short."""
    device = EmulatedDevice(n_sms=132)
    run(device, Case([Span(3000)], n_heads=2, n_kv_heads=1, head_dim=16, types=("f32", "f16")))
    run(device, Case([Span(200)], n_heads=8, n_kv_heads=1))
    device.close()


def test_few_new_tokens_behind_many() -> None:
    """A prompt that goes on far into its sequence is split over the multiprocessors too; rows of the same tile may see nothing
    of a split."""
    device = EmulatedDevice(n_sms=132)
    run(device, Case([Span(1100, 20), Span(3, 6)], "prompt", n_heads=4, head_dim=32, form="h16", padding=6))
    run(device, Case([Span(1100, 10), Span(900)], "mixed", n_heads=4, head_dim=32, window=700))
    run(device, Case([Span(600, 40)], "prompt", n_heads=3, n_kv_heads=3, head_dim=32, window=100))
    device.close()


@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_small_shared_memory_and_old_cards(kind: StepKind) -> None:
    device = EmulatedDevice(arch=75, shared_bytes=64 << 10)
    run(device, Case([Span(20, 30)], kind, head_dim=128, types=("bf16", "bf16")))
    run(device, Case([Span(20, 30)], kind, n_heads=4, n_kv_heads=1, head_dim=256))
    device.close()


def test_blocks_in_any_order_give_the_same_bits() -> None:
    """The merge of splits has one order, whichever block ends last."""
    results = []
    for descending in (False, True):
        device = EmulatedDevice(descending=descending)
        case = Case([Span(1500), Span(700)], head_dim=32)
        rng = np.random.default_rng(1)
        step = PagedStep(case.spans, 16, rng)
        pools = [Pool(step, "f16", 2, 32) for _ in range(2)]
        for pool in pools:
            for sequence, span in enumerate(case.spans):
                x = rng.normal(0, 1, (span.end, 2, 32)).astype(np.float32)
                pool.write(step.slots_of(sequence, 0, span.end), x)
        pages, size = layer_pages(device, *pools), StepShape("decode", 2, 2)
        need = scratch_sizes("f32", case.shape, size, pages, device)
        assert need.partial > 0
        scratch = AttentionScratch(device.alloc(need.partial), device.alloc(need.tickets), None)
        device.zero(scratch.tickets)
        out = Operand("f32", case.shape.width, device.empty(2, case.shape.width))
        q = device.array(rng.normal(0, 1, (2, case.shape.width)).astype(np.float32))
        for launch in build_attention(out, q, case.shape, size, step.fields(device), pages, device, scratch):
            device.launch(launch)
        results.append(device.values(out.data, np.float32))
        device.close()
    np.testing.assert_array_equal(results[0], results[1])


def test_heads_that_no_kernel_takes(device: EmulatedDevice) -> None:
    case = Case([Span(0)], head_dim=264)
    with pytest.raises(ModelError, match=r"264 columns.*n-gpu-layers 0"):
        run(device, case)


def test_what_can_be_written_and_fused_directly(device: EmulatedDevice) -> None:
    case = Case([Span(0)])
    step = PagedStep(case.spans, 16, np.random.default_rng(0))
    f16 = layer_pages(device, *(Pool(step, "f16", 2, 64) for _ in range(2)))
    bf16 = layer_pages(device, *(Pool(step, "bf16", 2, 64) for _ in range(2)))
    decode, prompt = StepShape("decode", 1, 1), StepShape("prompt", 64, 1)
    assert direct_form("a8", case.shape, decode, f16, device) == "a8"
    assert direct_form("a8", case.shape, prompt, f16, device) == "f32"
    assert direct_form("h16", case.shape, prompt, f16, device) == "h16"
    assert direct_form("h16", case.shape, prompt, bf16, device) == "f32"
    assert can_fuse_rope(case.shape, decode) and not can_fuse_rope(case.shape, prompt)
    assert not can_fuse_rope(replace(case, n_heads=18).shape, decode)
