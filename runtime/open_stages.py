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
from pyinfer.runtime.stage_plan import OUTPUTS
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
    if borrowed and not all(
        isinstance(backends[index], PartsBackend if index is None else LendingBackend) for index in _borrowers(borrowed)
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
    many_rows = [
        opener.more[number] if same is None else opener.stages[same] for number, same in enumerate(borrowed.same)
    ]
    lender = next(
        opener.more[n] for n, device in enumerate(borrowed.devices) if n in opener.more and device is not None
    )
    if isinstance(lender, PinningStage):
        lender.pin([memory for each in many_rows if isinstance(each, HostStage) for memory in each.result_memory])
    chain, max_outputs = StageChain(many_rows, sources(borrowed.parts)), max(OUTPUTS, config.max_sequences)
    return OpOffloadStage(usual, chain, borrowed.least_tokens(min_rows), max_outputs)


def _borrowers(plan: BorrowPlan) -> list[int | None]:
    """The devices with stages of their own in steps of many rows; None: the CPU."""
    own = [device for device, same in zip(plan.devices, plan.same, strict=True) if same is None]
    return list(dict.fromkeys(None if device is None else device.index for device in own))


class _Opener:
    def __init__(
        self, graphs: Sequence[Graph], borrowed: BorrowPlan | None, config: StageConfig, progress: Progress | None
    ) -> None:
        self.stages: dict[int, Stage] = {}  # by the number of the part
        self.more: dict[int, Stage] = {}  # of the borrowed plan's parts, those that are not the same
        self._graphs, self._borrowed, self._config, self._progress = graphs, borrowed, config, progress
        self._read = sources(borrowed.parts) if borrowed else []

    def open(self, backend: Backend, index: int | None, numbers: Sequence[int]) -> None:
        """The parts of these numbers, which share what the backend lets them share."""
        own, borrowed, config = [self._graphs[number] for number in numbers], self._borrowed, self._config
        lasts = last_readers(self._graphs, numbers)
        if borrowed and index in _borrowers(borrowed):
            more = [n for n, same in enumerate(borrowed.same) if same is None and self._index(n) == index]
            graphs, more_lasts = [borrowed.parts[number] for number in more], last_readers(borrowed.parts, more)
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
        """Results of a part that only parts of its GPU read: those that it has for steps of many rows, or the next one."""
        assert self._borrowed is not None
        same, kept = self._borrowed.same, []
        for i, value in enumerate(self._borrowed.parts[number].results):
            readers = [reader for reader, places in enumerate(self._read) if (number, i) in places]
            if all(
                self._index(reader) == self._index(number) and (same[reader] is None or reader == number + 1)
                for reader in readers
            ):
                kept.append(value)
        return tuple(kept)

    def _index(self, number: int) -> int | None:
        """The device of a part of the borrowed plan."""
        assert self._borrowed is not None
        device = self._borrowed.devices[number]
        return None if device is None else device.index
