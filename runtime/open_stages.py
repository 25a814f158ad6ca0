"""Opening the stages of an `OffloadPlan`, those of a device together, and chaining them."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfer.graph.backend import (
    Backend,
    Borrowed,
    HostStage,
    LendingBackend,
    PartsBackend,
    PinningStage,
    Progress,
    Stage,
    StageConfig,
)
from pyinfer.graph.graph import Graph
from pyinfer.graph.ops import Value
from pyinfer.graph.split import last_readers, sources
from pyinfer.runtime.backends import open_backend, open_ranks
from pyinfer.runtime.borrow_plan import BorrowPlan
from pyinfer.runtime.offload import OffloadPlan
from pyinfer.runtime.op_offload import OpOffloadStage
from pyinfer.runtime.stage_chain import StageChain
from pyinfer.runtime.tensor_stage import open_tensor_stage

MIN_ROWS = 32  # of a step that another device computes products for, as in llama.cpp


def open_stages(
    plan: OffloadPlan, config: StageConfig, host: str, progress: Progress | None, min_rows: int = MIN_ROWS
) -> Stage:
    """The plan's stages, as one. `host` is the backend of those without a GPU. DeviceMemoryError if a GPU lacks room.

    Steps of at least `min_rows` tokens use what the plan has borrowed.
    """
    graphs = [graph for graph, _ in plan.parts]
    if plan.is_tensor:
        ranks = open_ranks([each.device.index for each in plan.stages if each.device is not None])
        return open_tensor_stage(ranks, graphs, config, progress)
    own: dict[int | None, list[int]] = {}  # device -> the parts that are there
    for number, (_, device) in enumerate(plan.parts):
        own.setdefault(None if device is None else device.index, []).append(number)
    backends = {index: open_backend(host) if index is None else open_backend("gpu", index) for index in own}
    borrowed = plan.borrowed
    if borrowed and not (
        isinstance(backends[None], PartsBackend) and isinstance(backends[borrowed.device.index], LendingBackend)
    ):
        borrowed = None
    opener = _Opener(graphs, borrowed, config, progress)
    try:
        for index, numbers in own.items():
            opener.open(backends[index], index, numbers)
    except BaseException:
        for stage in (*opener.stages.values(), *opener.more.values()):
            stage.close()
        raise
    in_order = [opener.stages[number] for number in range(len(graphs))]
    if len(in_order) == 1:
        return in_order[0]
    usual = StageChain(in_order, sources(graphs))
    if not borrowed:
        return usual
    first = [opener.more[number] for number in range(len(borrowed.parts))]
    lender = next(stage for stage, goes in zip(first, borrowed.goes, strict=True) if goes)
    if isinstance(lender, PinningStage):
        lender.pin([memory for stage in first if isinstance(stage, HostStage) for memory in stage.result_memory])
    return OpOffloadStage(usual, StageChain([*first, *in_order[1:]], sources(opener.many_rows)), min_rows)


class _Opener:
    def __init__(
        self, graphs: Sequence[Graph], borrowed: BorrowPlan | None, config: StageConfig, progress: Progress | None
    ) -> None:
        self.stages: dict[int, Stage] = {}  # by the number of the part
        self.more: dict[int, Stage] = {}  # of the borrowed plan's parts
        self._graphs, self._borrowed, self._config, self._progress = graphs, borrowed, config, progress
        self.many_rows = [*borrowed.parts, *graphs[1:]] if borrowed else []

    def open(self, backend: Backend, index: int | None, numbers: Sequence[int]) -> None:
        """The parts of these numbers, which share what the backend lets them share."""
        own, borrowed, config = [self._graphs[number] for number in numbers], self._borrowed, self._config
        lasts = last_readers(self._graphs, numbers)
        if borrowed and index in (None, borrowed.device.index):
            more = [number for number, goes in enumerate(borrowed.goes) if goes == (index is not None)]
            graphs, more_lasts = [borrowed.parts[number] for number in more], last_readers(self.many_rows, more)
            if isinstance(backend, LendingBackend):
                lent = Borrowed(tuple(graphs), tuple(more_lasts), tuple(self._kept(number) for number in more))
                stages: Sequence[Stage] = backend.open_lending_stages(own, lent, config, self._progress, lasts)
            else:
                assert isinstance(backend, PartsBackend)
                lasts += [len(own) + last for last in more_lasts]
                stages = backend.open_stages([*own, *graphs], config, self._progress, lasts)
            self.more.update(zip(more, stages[len(own) :], strict=True))
        elif len(own) > 1 and isinstance(backend, PartsBackend):
            stages = backend.open_stages(own, config, self._progress, lasts)
        else:
            for number, graph in zip(numbers, own, strict=True):
                self.stages[number] = backend.open_stage(graph, config, self._progress)
            return
        self.stages.update(zip(numbers, stages[: len(own)], strict=True))

    def _kept(self, number: int) -> tuple[Value, ...]:
        """Results of a part that goes which only others that go read, or only the GPU's own part behind the last of them."""
        assert self._borrowed is not None
        goes, read = self._borrowed.goes, sources(self.many_rows)
        kept = []
        for i, value in enumerate(self.many_rows[number].results):
            readers = {reader for reader, places in enumerate(read) if (number, i) in places}
            if readers == {len(goes)} or all(reader < len(goes) and goes[reader] for reader in readers):
                kept.append(value)
        return tuple(kept)
