"""Stages of real kernels that share a device: cut anywhere, they compute what one does, and need the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from batches import Piece, make_batch, one_table, run_prompt
from cuda_emulator.build import has_compiler
from cuda_emulator.device import EmulatedDevice
from cut_places import cut_places
from tiny_models import TinyShape

from pyinfer.graph.backend import PartStage, StageConfig
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Attention, GatedActivation, MatMul, Op
from pyinfer.graph.passes import optimize
from pyinfer.graph.reference import ReferenceBackend
from pyinfer.graph.split import block_cuts, last_readers, sources, split_graph
from pyinfer.kernels_cpu.backend import CPUBackend
from pyinfer.kernels_cpu.stage import CPUStage
from pyinfer.kernels_gpu.backend import stages_on
from pyinfer.kernels_gpu.stage import GPUStage
from pyinfer.quant.gguf import GGUFFile
from pyinfer.runtime.models.registry import build_graph
from pyinfer.runtime.stage_chain import StageChain

pytestmark = pytest.mark.backend
TinyModel = Callable[..., Path]
SHAPE = TinyShape(n_layers=3)
PROMPT: list[int] = np.random.RandomState(5).randint(0, 300, 40).tolist()
PAGES = [3, 0, 6, 5]
CONFIG = StageConfig(n_pages=8, n_ctx=128, max_tokens=24, max_sequences=4, n_threads=2)


def graph_of(path: Path) -> Graph:
    return one_table(optimize(build_graph(GGUFFile.open(path))))


def ops_of(graph: Graph, kind: type[Op], after: int = 0) -> list[int]:
    """Where ops of this kind are, or so many ops behind."""
    return [i + after for i, op in enumerate(graph.ops) if isinstance(op, kind)]


def around_attention(graph: Graph) -> list[int]:
    """Rope, pages and attention of each block in a part of their own, between projections."""
    products = [i + 1 for i in ops_of(graph, MatMul) if len(graph.ops[i].outputs) == 3]
    return sorted([*products, *ops_of(graph, Attention, 1)])


def around_feed_forward(graph: Graph) -> list[int]:
    """The second half of each block in parts, from gate and up to their activation and from there on."""
    products = [i for i in ops_of(graph, MatMul) if len(graph.ops[i].outputs) == 2]
    return sorted([*products, *ops_of(graph, GatedActivation, 1)])


CUTS: dict[str, Callable[[Graph], list[int]]] = {
    "attention": around_attention,
    "feed forward": around_feed_forward,
    "every op": cut_places,
}


def parts_of(graph: Graph, cuts: Sequence[int]) -> list[Graph]:
    """All for one device."""
    return split_graph(graph, cuts, ["it"] * (len(cuts) + 1))


def on_cpu(parts: Sequence[Graph]) -> StageChain:
    lasts = last_readers(parts, range(len(parts)))
    return StageChain(CPUBackend().open_stages(parts, CONFIG, None, lasts), sources(parts))


def steps(stage: PartStage | StageChain) -> list[npt.NDArray[np.float32]]:
    """Prompts in chunks, a step without outputs, decoding of two sequences."""
    batches = [
        make_batch([Piece(PROMPT[:20], PAGES)], 16, []),
        make_batch([Piece(PROMPT[20:25], PAGES, 20), Piece(PROMPT[:18], [7, 1])], 16, [4, 22]),
        make_batch([Piece(PROMPT[25:26], PAGES, 25), Piece(PROMPT[18:19], [7, 1], 18)], 16),
        make_batch([Piece(PROMPT[26:27], PAGES, 26), Piece(PROMPT[19:20], [7, 1], 19)], 16),
    ]
    return [stage.run(batch).copy() for batch in batches]


@pytest.mark.parametrize("place", CUTS)
@pytest.mark.parametrize("arch, codec", [("llama", "Q4_0"), ("gemma3", "Q8_0"), ("qwen3", "F16"), ("qwen2moe", "Q4_0")])
def test_cpu_stages_keep_every_bit(place: str, arch: str, codec: str, tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model(arch, codec, shape=SHAPE))
    parts = parts_of(graph, CUTS[place](graph))
    assert len(parts) >= 7
    whole, chain = CPUBackend().open_stage(graph, CONFIG), on_cpu(parts)
    try:
        for found, expected in zip(steps(chain), steps(whole), strict=True):
            np.testing.assert_array_equal(found, expected)
    finally:
        whole.close()
        chain.close()


def test_cpu_stages_share_threads_and_rows(tiny_model: TinyModel) -> None:
    graph = graph_of(tiny_model("llama", "Q4_0", shape=TinyShape(n_layers=6)))
    parts = parts_of(graph, around_attention(graph))
    chain = on_cpu(parts)
    stages = [stage for stage in chain.stages if isinstance(stage, CPUStage)]
    assert len(stages) == 13 and len({id(stage._pool) for stage in stages}) == 1
    later = {id(buffer.memory) for stage in stages[5:] for buffer in stage._lowered.results}
    earlier = {id(buffer.memory) for stage in stages[:5] for buffer in stage._lowered.results}
    assert later - {id(b.memory) for b in stages[-1]._lowered.results} <= earlier | {
        id(m) for m in stages[0]._share.free
    }
    chain.close()
    with pytest.raises(AssertionError):  # the threads ended with the last stage
        stages[0].run(make_batch([Piece(PROMPT[:4], PAGES)], 16))


@pytest.mark.skipif(not has_compiler, reason="the emulator needs g++")
class TestOnAGPU:
    def on_gpu(self, parts: Sequence[Graph], device: EmulatedDevice) -> StageChain:
        lasts = last_readers(parts, range(len(parts)))
        return StageChain(stages_on(device, parts, CONFIG, None, lasts), sources(parts))

    @pytest.mark.parametrize("place", ["attention", "every op"])
    @pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen2moe"])
    def test_stages_compute_what_one_does(self, place: str, arch: str, tiny_model: TinyModel) -> None:
        graph = graph_of(tiny_model(arch, "Q4_0"))
        device = EmulatedDevice()
        chain = self.on_gpu(parts_of(graph, CUTS[place](graph)), device)
        expected = ReferenceBackend().open_stage(graph, CONFIG)
        for found, right in zip(steps(chain), steps(expected), strict=True):
            assert found.shape == right.shape
            assert np.abs(found - right).max(initial=0) < 4e-2 * np.abs(right).max(initial=1)
        sampler = chain.stages[-1]
        assert isinstance(sampler, GPUStage) and chain.can_sample and not isinstance(sampler, StageChain)
        chain.close()
        assert device.memory()[0] == device.memory()[1]

    def test_block_parts_keep_every_bit_and_take_little_more_memory(self, tiny_model: TinyModel) -> None:
        graph = graph_of(tiny_model("qwen2", "Q8_0", shape=SHAPE))
        alone, shared = EmulatedDevice(), EmulatedDevice()
        whole = GPUStage(alone, graph, CONFIG)
        chain = self.on_gpu(parts_of(graph, block_cuts(graph)), shared)
        assert len(chain.stages) == 5
        used = [device.memory()[1] - device.memory()[0] for device in (alone, shared)]
        assert used[1] < used[0] + 4 * 24 * 300 * 4
        for found, expected in zip(steps(chain), steps(whole), strict=True):
            np.testing.assert_array_equal(found, expected)
        whole.close()
        chain.close()

    def test_devices_in_turns(self, tiny_model: TinyModel) -> None:
        """Attention of all blocks on the GPU, feed-forward on the CPU, pages through both."""
        graph = graph_of(tiny_model("qwen3", "Q4_0", shape=SHAPE))
        starts = [i for i in ops_of(graph, MatMul) if len(graph.ops[i].outputs) == 2]
        ends = [i + 2 for i in ops_of(graph, GatedActivation)]
        parts = split_graph(graph, sorted([*starts, *ends]), ["gpu", "cpu"] * 3 + ["gpu"])
        gpu, cpu = range(0, 7, 2), range(1, 7, 2)
        stages: list[PartStage] = [None] * 7  # type: ignore[list-item]
        stages[::2] = stages_on(EmulatedDevice(), [parts[i] for i in gpu], CONFIG, None, last_readers(parts, gpu))
        stages[1::2] = CPUBackend().open_stages([parts[i] for i in cpu], CONFIG, None, last_readers(parts, cpu))
        chain = StageChain(stages, sources(parts))
        expected = run_prompt(ReferenceBackend().open_stage(graph, CONFIG), PROMPT, PAGES, 16, 24)
        found = run_prompt(chain, PROMPT, PAGES, 16, 24)
        assert np.abs(found - expected).max() < 4e-2 * np.abs(expected).max()
        again = make_batch([Piece(PROMPT[-1:], [3, 0, 4], 39)], 16)
        right = chain.run(make_batch([Piece(PROMPT[-1:], PAGES, 39)], 16)).copy()
        chain.write_pages([4], chain.read_pages([6]))
        np.testing.assert_array_equal(chain.run(again), right)
        chain.close()


def test_what_is_read_last() -> None:
    """Of parts that take turns on two devices, in a chain where the third reads what the first made."""
    from pyinfer.graph.ops import Add, Hidden, Value

    a, b, c, d = (Value(name, 32) for name in "abcd")

    def part(reads: Sequence[Value], out: Value) -> Graph:
        ops = (*map(Hidden, reads), Add(out, reads[0], reads[-1]))
        return Graph(ops, out, (), 7, 32, 16)

    start = Value("s", 32)
    parts = [Graph((Add(a, start, start),), a, (), 7, 32, 16), part([a], b), part([a, b], c), part([c], d)]
    assert last_readers(parts, [0, 2]) == [1, 1]
    assert last_readers(parts, [1, 3]) == [0, 1]
    assert last_readers(parts, [0, 1, 2, 3]) == [2, 2, 3, 3]
